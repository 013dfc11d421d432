"""What pictures drawn with a LoRA show beside the loss: how like the training pictures, copied, varied, spilled over.

Everywhere an embedding is a row of length 1 of one image encoder, so that a product of two is their cosine, and 1 minus
it their distance. No cosine means anything by itself, since every encoder has its own scale: each number is set beside
the same one of the untrained model or of the training pictures among themselves. The limits are guesses from few runs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from .checkpoint import Validation
from .doctor.pictures import perceptual_hashes
from .scores import Score, Scored, comparable, differences

NEIGHBOURS, AT_ONCE = 3, 1000
COPIED_BITS = 10
"""Hashes this near are of one picture, as found among 180 real ones (doctor/duplicates.py)."""
USUAL = 0.95
"""The share of training pictures whose nearest neighbour among the others is farther than what is called a copy."""
LEAST_VARIETY, MOST_BLEED, LEAST_ADHERENCE = 0.6, 0.5, 0.02
MISLEADING, DEVIATIONS, FEWEST_CAPTIONS = 0.02, 6.0, 4
"""ln of the loss with a caption over that without it from which on it misleads, how many standard deviations of the
others it must lie above them, and of how many captions at least. In the toy world 24 right captions gave -1.33 to .05,
23 wrong ones .30 to 1.85."""
LARGEST_GROWTH, LARGEST_CHANGE = 5.0, 2.0
"""How many times the usual rate, and the norm before, the weights must grow to be called a jump."""


@dataclass(frozen=True)
class Fingerprint:
    """The 64-bit perceptual hash of a picture and that of its mirror image."""

    straight: int
    mirrored: int

    def bits_from(self, other: Fingerprint) -> tuple[int, bool]:
        """In how many of 64 bits two pictures differ, either way round, and whether one is the other mirrored."""
        straight, turned = (self.straight ^ other.straight).bit_count(), (self.straight ^ other.mirrored).bit_count()
        return min(straight, turned), turned < straight


@dataclass(frozen=True)
class Copy:
    """A drawn picture that repeats a training picture, by their numbers."""

    picture: int
    training: int
    cosine: float
    bits: int
    mirrored: bool


def fingerprint(picture: Image.Image) -> Fingerprint:
    """The perceptual hashes of a picture."""
    straight, mirrored = (
        sum(1 << n for n in bits.nonzero()[0].tolist()) for bits in perceptual_hashes(picture.convert("L"))
    )
    return Fingerprint(straight, mirrored)


def likeness(pictures: Tensor, training: Tensor) -> float:
    """The mean over pictures (N, D) of the mean cosine to the three nearest of the training pictures (M, D)."""
    return _nearest(pictures.float() @ training.float().t())


def own_likeness(training: Tensor) -> float | None:
    """The likeness of each training picture to the others; None for fewer than two."""
    if len(training) < 2:
        return None
    cosines = training.float() @ training.float().t()
    others = ~torch.eye(len(training), dtype=torch.bool)
    return _nearest(cosines[others].view(len(training), -1))


def scaled_likeness(pictures: Tensor, base: Tensor, training: Tensor) -> float | None:
    """Likeness on a scale from 0, as the untrained model draws, to 1, as the training pictures are to one another.

    None where the scale has no length: fewer than two training pictures, or pictures the base draws as well.
    """
    whole, none = own_likeness(training), likeness(base, training)
    if whole is None or whole - none < 1e-4:
        return None
    return (likeness(pictures, training) - none) / (whole - none)


def near_copies(
    pictures: Tensor,
    fingerprints: Sequence[Fingerprint],
    training: Tensor,
    training_fingerprints: Sequence[Fingerprint],
) -> list[Copy]:
    """The pictures that repeat a training picture, each with the one it repeats most.

    A copy is nearer to it than training pictures usually are to their nearest (the 95 % quantile), and its hash at most
    ten bits away, as it is or mirrored. Duplicates among the training pictures do not count there: they would make
    anything usual.
    """
    limit = _usual_cosine(training.float(), training_fingerprints)
    if limit is None:
        return []
    cosines = pictures.float() @ training.float().t()
    copies = []
    for number, row in enumerate(cosines.tolist()):
        found = [
            Copy(number, other, cosine, *fingerprints[number].bits_from(training_fingerprints[other]))
            for other, cosine in enumerate(row)
            if cosine > limit
        ]
        found = [copy for copy in found if copy.bits <= COPIED_BITS]
        copies += [max(found, key=lambda copy: (copy.cosine, -copy.bits))] if found else []
    return copies


def variety(pictures: Sequence[Tensor], base: Sequence[Tensor]) -> float | None:
    """The distance between pictures of one prompt at several seeds (S, D), over prompts, relative to the base's.

    None without a prompt drawn at two seeds, and where the base itself draws no variety.
    """
    own, usual = _mean_spread(pictures), _mean_spread(base)
    return own / usual if own is not None and usual else None


def bleed(pictures: Tensor, base: Tensor, other_seed: Tensor) -> float | None:
    """How far prompts without the trigger word are drawn from the base's pictures at the same seed (N, D each).

    In units of the base's own distance between two seeds; None where it has none.
    """
    usual = _mean_distance(base, other_seed)
    return _mean_distance(pictures, base) / usual if usual > 1e-6 else None


def adherence(pictures: Tensor, texts: Tensor) -> float:
    """The mean cosine between each picture and its prompt (CLIP-T), both (N, D) of one space."""
    return (pictures.float() * texts.float()).sum(1).mean().item()


def caption_margin(pictures: Tensor, captions: Tensor) -> float | None:
    """How much nearer the pictures of the dataset are to their own captions than to the others'.

    Where it is small the two encoders share no space, or the captions say nothing. None for fewer than two pictures.
    """
    if len(pictures) < 2:
        return None
    cosines = pictures.float() @ captions.float().t()
    own = cosines.diagonal()
    return (own.mean() - (cosines.sum() - own.sum()) / (cosines.numel() - len(own))).item()


def can_judge_adherence(pictures: Tensor, captions: Tensor) -> bool:
    """The self-test: whether adherence means anything with these encoders on this dataset."""
    margin = caption_margin(pictures, captions)
    return margin is not None and margin > LEAST_ADHERENCE


def copy_note(copies: Sequence[Copy], training_names: Sequence[str]) -> str:
    """A sentence about near-copies, "" without any."""
    if not copies:
        return ""
    worst = max(copies, key=lambda copy: copy.cosine)
    how = "mirrored, " if worst.mirrored else ""
    count = "1 picture repeats" if len(copies) == 1 else f"{len(copies)} pictures repeat"
    return (
        f"{count} a training picture, the nearest {training_names[worst.training]} ({how}{worst.bits} of 64 bits "
        "apart): this LoRA copies, so prefer an earlier file, or add pictures."
    )


def variety_note(value: float | None) -> str:
    """A sentence about too little variety, "" for enough."""
    if value is None or value >= LEAST_VARIETY:
        return ""
    return (
        f"Pictures of one prompt vary {100 * value:.0f} % as much as the base model's: less variety, so prefer an "
        "earlier file, or a lower strength."
    )


def bleed_note(value: float | None) -> str:
    """A sentence about a LoRA that changes what it was not asked for, "" for one that does not."""
    if value is None or value <= MOST_BLEED:
        return ""
    return (
        f"Prompts without the trigger word change by {100 * value:.0f} % of what another seed changes: the LoRA spills "
        "over, so lower its strength, or train with regularization pictures."
    )


def caption_notes(base: Score, blank: Score, names: Sequence[str]) -> list[str]:
    """Sentences about captions that tell the untrained model less than none would; `blank` is it without captions.

    A wrong caption raises the loss, since the model then expects another picture. What a caption usually does differs
    between models, so each is judged beside the others. `names` are of the held-out and then of the training pictures.
    """
    told = [*_changes(base.held_out, blank.held_out), *_changes(base.training, blank.training)]
    if len(told) < FEWEST_CAPTIONS or len(told) != len(names):
        return []
    if statistics.median(told) > MISLEADING:
        return [
            "The untrained model does better without most of the captions: look whether each lies beside its picture, "
            "and whether they are written as this model expects."
        ]
    wrong = [name for number, name in enumerate(names) if told[number] > _usual_most(told, number)]
    return [
        f"The caption of {name} tells the untrained model less than no caption would: look whether it belongs to the "
        "picture."
        for name in wrong
    ]


def weight_notes(scored: Sequence[Scored]) -> list[str]:
    """Sentences about files whose change of the weights is zero, or jumps beside that of the file before."""
    entries = [entry for entry in scored if not entry.checkpoint.average and _is_measured(entry)]
    notes = [
        f"{_named(entry)} changes no weight at all: it has learned nothing."
        for entry in entries
        if entry.score.effect == 0
    ]
    grown = [entry for entry in entries if entry.score.effect > 0]
    rates = [_rate(before, after) for before, after in zip([None, *grown], grown, strict=False)]
    for number in range(1, len(grown)):
        notes += _jump(grown[number - 1], grown[number], rates[number], rates[:number] + rates[number + 1 :])
    return notes


def _changes(values: Validation, others: Validation) -> list[float]:
    """The mean ln of one loss over the other, of each picture; [] where they cannot be compared."""
    return differences(values, others) if comparable(values, others) else []


def _usual_most(values: Sequence[float], number: int) -> float:
    """How far a value may lie above the others, by their median and their spread (1.4826 MAD)."""
    others = [*values[:number], *values[number + 1 :]]
    middle = statistics.median(others)
    spread = 1.4826 * statistics.median(abs(value - middle) for value in others)
    return max(MISLEADING, middle + max(MISLEADING, DEVIATIONS * spread))


def _jump(before: Scored, after: Scored, rate: float, others: Sequence[float]) -> list[str]:
    times = after.score.effect / before.score.effect
    if times >= LARGEST_CHANGE and rate > LARGEST_GROWTH * statistics.median(map(abs, others)):
        what = f"{times:.1f} times as much"
        why = "the training became unstable there, so prefer a file from before, or lower learning_rate"
    elif times <= 1 / LARGEST_CHANGE:
        what, why = f"only {100 * times:.0f} % as much", "the two may not be of one run"
    else:
        return []
    return [f"{_named(after)} changes the weights {what} as {before.checkpoint.label}: {why}."]


def _is_measured(entry: Scored) -> bool:
    return entry.score.effect is not None and math.isfinite(entry.score.effect)


def _named(entry: Scored) -> str:
    return entry.checkpoint.label.capitalize()


def _rate(before: Scored | None, after: Scored) -> float:
    """How fast the change of the weights grew per step."""
    steps = after.checkpoint.step - (before.checkpoint.step if before else 0)
    return (after.score.effect - (before.score.effect if before else 0)) / max(1, steps)


def _nearest(cosines: Tensor) -> float:
    return cosines.topk(min(NEIGHBOURS, cosines.shape[1]), dim=1).values.mean().item()


def _usual_cosine(training: Tensor, fingerprints: Sequence[Fingerprint]) -> float | None:
    """The 95 % quantile of the cosines to the nearest other picture; None where no two differ."""
    straight, mirrored = (_signs([getattr(one, way) for one in fingerprints]) for way in ("straight", "mirrored"))
    nearest = torch.empty(len(training), dtype=torch.float64)
    for some in torch.arange(len(training)).split(AT_ONCE):
        agreement = torch.maximum(straight[some] @ straight.t(), straight[some] @ mirrored.t())
        copied = (64 - agreement) / 2 <= COPIED_BITS  # as is the picture itself
        nearest[some] = (training[some] @ training.t()).double().masked_fill(copied, -torch.inf).amax(1)
    nearest = nearest[nearest.isfinite()]
    return nearest.quantile(USUAL).item() if len(nearest) else None


def _signs(hashes: Sequence[int]) -> Tensor:
    """The bits of each hash as signs (N, 64): a product of two is how many bits agree less how many do not."""
    return torch.tensor([[1.0 if value >> bit & 1 else -1.0 for bit in range(64)] for value in hashes])


def _mean_spread(groups: Sequence[Tensor]) -> float | None:
    spreads = [_spread(group.float()) for group in groups if len(group) > 1]
    return statistics.fmean(spreads) if spreads else None


def _spread(group: Tensor) -> float:
    """The mean distance between every two rows."""
    first, second = torch.triu_indices(len(group), len(group), offset=1)
    return _mean_distance(group[first], group[second])


def _mean_distance(one: Tensor, other: Tensor) -> float:
    return (1 - (one.float() * other.float()).sum(1)).mean().clamp(min=0).item()
