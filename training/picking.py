"""Which checkpoint to use, from the loss on pictures that were kept out of training.

With H of every file (scores.py), the best file has the lowest H. Its neighbours are as good as long as they are within
measuring error of it: the safe range. Files are ordered by step; averages are candidates too, but what became of the
training is told from the weights as trained. The rules and their limits were tried on simulated curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from . import scores
from .checkpoint import Checkpoint, Checkpoints, Validation
from .scores import Score, Scored, comparable, differences, mean_difference, standard_error

SUGGESTED, LAST, AT_STEP, ASK_ME = "suggested", "last", "at step", "ask me"
PICKS = (SUGGESTED, LAST, AT_STEP, ASK_ME)
BALANCED, FLEXIBLE, LIKENESS = "balanced", "flexible", "likeness"
PREFERENCES = (BALANCED, FLEXIBLE, LIKENESS)
NOTHING_LEARNED, STILL_IMPROVING, LEVELLED_OFF = "nothing learned", "still improving", "levelled off"
OVER_TRAINED, GUESS = "over-trained later", "guess"
HIGH, MEDIUM, LOW = "high", "medium", "low"

HARMFUL = 0.5
"""A file with a higher H has done damage, or is for another model."""
SMALLEST_DIFFERENCE = 0.003
SMALLEST_IMPROVEMENT, SMALLEST_IMPROVEMENT_OF_FEW, FEW = 0.012, 0.02, 4
STANDARD_ERRORS = 2.5
LARGE_IMPROVEMENT = 0.1
"""So much is not called nothing, though pictures that disagree leave it unsure."""
LAST_STEPS, SMALLEST_STEP = 3, 0.005
SMALLEST_RISE = 0.01
RUIN, RUIN_ERRORS = 0.05, 4
"""So much above the base, and above chance, the last file has unlearned: there is no need to have learned before."""
SHARES_OF_GAIN = {FLEXIBLE: 0.5, BALANCED: 0.75, LIKENESS: 0.9}
"""How much of what is gained on training pictures the pick has, where no picture was kept out."""
STRENGTHS = (0.25, 0.5, 0.75, 1.0, 1.25)
WEAK = 0.6
"""A LoRA that does best below this strength has learned too much of its pictures."""


@dataclass(frozen=True)
class Decision:
    """The suggested checkpoint, those that are as good, what became of the training, and how sure that is.

    `kind` is one of "nothing learned", "still improving", "levelled off", "over-trained later" and "guess",
    `confidence` "high", "medium" or "low", `reason` is for the user. `broken` are the files that were left out.
    """

    checkpoint: Checkpoint
    safe: tuple[Checkpoint, ...]
    kind: str
    confidence: str
    reason: str
    broken: tuple[Checkpoint, ...] = ()


@dataclass(frozen=True)
class Picked:
    """The chosen checkpoint and the reason, in words for the user."""

    checkpoint: Checkpoint
    reason: str


def choose(checkpoints: Checkpoints, pick: str, at_step: int, preference: str) -> Picked:
    """The checkpoint the user asked for, or the one suggested by what the trainer itself measured.

    ValueError when there is none, or none at that step.
    """
    entries = checkpoints.entries
    if not entries:
        raise ValueError(why_none(checkpoints))
    if pick == AT_STEP:
        return Picked(_at_step(entries, at_step, checkpoints.name), f"Step {at_step:,} was asked for.")
    if pick == LAST:
        return Picked(entries[-1], f"Step {entries[-1].step:,} is the last checkpoint.")
    measured = [Scored(entry, Score(entry.validation or [])) for entry in entries]
    decision = decide(measured, Score(checkpoints.base_validation or []), preference)
    return Picked(decision.checkpoint, decision.reason)


def why_none(checkpoints: Checkpoints) -> str:
    """The sentence for a run without files."""
    return f"The run '{checkpoints.name}' has no checkpoint left in '{checkpoints.folder}': train again."


def measured_of(checkpoints: Checkpoints) -> list[Checkpoint]:
    """The checkpoints that the trainer measured: those whose held-out losses can be compared with the base's."""
    return [entry for entry in checkpoints.entries if comparable(entry.validation, checkpoints.base_validation)]


def decide(
    measured: Sequence[Scored], base: Score, preference: str, likeness: Mapping[str, float] | None = None
) -> Decision:
    """Which file to use, and what became of the training.

    `likeness` by `lora_name` chooses among the files that are as good when the preference is "likeness"; files that
    copy their pictures are left out of it. ValueError naming a file when none can be used.
    """
    if not measured:
        raise ValueError("There is no LoRA file to choose from: train one, or choose a folder that holds some.")
    ordered = sorted(measured, key=lambda entry: (entry.checkpoint.step, bool(entry.checkpoint.average)))
    broken = tuple(entry.checkpoint for entry in ordered if why_broken(entry.score, base))
    sound = [entry for entry in ordered if entry.checkpoint not in broken]
    if not sound:
        return _least_harm(ordered, base, broken)
    kept_out = [entry for entry in sound if comparable(entry.score.held_out, base.held_out)]
    if kept_out:
        training = [entry.score.training for entry in kept_out]
        curve = _Curve(kept_out, base.held_out, training, base.training, _harmful_steps(ordered, base.held_out))
        return _from_curve(curve, preference, likeness or {}, broken)
    return _guess(sound, base, preference, broken)


def why_broken(score: Score, base: Score) -> str:
    """Why a file cannot be used, in a few words; "" for one that can."""
    if score.broken:
        return score.broken
    for values, others in ((score.held_out, base.held_out), (score.training, base.training)):
        if values and not scores.is_proper(values):
            return "its loss is not a number"
        if comparable(values, others):
            mean = mean_difference(values, others)
            return f"it makes the loss {-scores.percent_of(mean):.0f} % higher" if mean > HARMFUL else ""
    return ""


def recommended_strength(by_strength: Mapping[float, Validation], base: Validation) -> tuple[float, str]:
    """The strength with the lowest H, 1 where none is better than the base; and what a low one means, or ""."""
    means = {strength: mean_difference(values, base) for strength, values in by_strength.items()}
    best = min(means, key=lambda strength: (means[strength], abs(strength - 1)))
    if means[best] >= 0:
        return 1.0, ""
    if best >= WEAK:
        return best, ""
    return best, (
        f"It does best at strength {best:g}, so it has learned too much of its pictures: use it at {best:g}, or pick "
        "an earlier checkpoint."
    )


@dataclass(frozen=True)
class _Curve:
    """Files in order, with D of each held-out picture, and the training pictures' losses to tell the story with."""

    entries: Sequence[Scored]
    base: Validation
    training: Sequence[Validation] = ()
    training_base: Validation = field(default_factory=list)
    harmful: Sequence[int] = ()
    """Steps of files that were left out because they make the losses so much higher."""

    @cached_property
    def values(self) -> list[list[float]]:
        return [differences(entry.score.held_out, self.base) for entry in self.entries]

    @cached_property
    def means(self) -> list[float]:
        return [sum(values) / len(values) for values in self.values]

    @cached_property
    def best(self) -> int:
        return min(range(len(self.means)), key=self.means.__getitem__)

    @cached_property
    def trained(self) -> list[int]:
        """Places of the weights as trained; of all files where there are averages only."""
        own = [place for place, entry in enumerate(self.entries) if not entry.checkpoint.average]
        return own or list(range(len(self.entries)))

    @cached_property
    def best_trained(self) -> int:
        return min(self.trained, key=self.means.__getitem__)

    @property
    def pictures(self) -> int:
        return len(self.base)

    def checkpoint(self, place: int) -> Checkpoint:
        return self.entries[place].checkpoint

    def error(self, place: int, other: int) -> float:
        """Of the mean difference between two files."""
        return standard_error(self.values[place], self.values[other])

    def is_as_good(self, place: int) -> bool:
        """Whether a file is as good as the best one within measuring error."""
        lowest = self.means[self.best]
        allowed = max(self.error(place, self.best), -0.05 * lowest, SMALLEST_DIFFERENCE)
        return self.means[place] - lowest <= allowed

    @cached_property
    def run(self) -> list[int]:
        """The neighbours of the best weights as trained that are as good as the best file, without a gap."""
        middle = self.trained.index(self.best_trained)
        if not self.is_as_good(self.trained[middle]):
            return []
        first = last = middle
        while first > 0 and self.is_as_good(self.trained[first - 1]):
            first -= 1
        while last + 1 < len(self.trained) and self.is_as_good(self.trained[last + 1]):
            last += 1
        return self.trained[first : last + 1]

    @cached_property
    def safe(self) -> list[int]:
        """That run, and the averages that are as good."""
        averages = [place for place in range(len(self.entries)) if place not in self.trained and self.is_as_good(place)]
        return sorted([*self.run, *averages])

    @property
    def is_measurable(self) -> bool:
        """Whether the best improvement over the base is more than the differences between pictures explain."""
        least = SMALLEST_IMPROVEMENT_OF_FEW if self.pictures < FEW else SMALLEST_IMPROVEMENT
        error = standard_error(self.values[self.best], [0.0] * self.pictures)
        return -self.means[self.best] >= max(least, STANDARD_ERRORS * error)

    @property
    def kind(self) -> str:
        """What became of the training."""
        if self.ends_in_ruin:
            return OVER_TRAINED
        if not self.is_measurable:
            return GUESS if -self.means[self.best] >= LARGE_IMPROVEMENT else NOTHING_LEARNED
        means = [self.means[place] for place in self.trained]
        learned, count = -self.means[self.best_trained], len(means)
        rise, error = means[-1] + learned, self.error(self.trained[-1], self.best_trained)
        if rise > max(2 * error, 0.1 * learned, SMALLEST_RISE):
            return OVER_TRAINED
        gained = means[max(0, count - 1 - LAST_STEPS)] - means[-1]
        is_late = count >= LAST_STEPS and self.best_trained in self.trained[-2:]
        return STILL_IMPROVING if is_late and gained > max(0.03 * learned, SMALLEST_STEP) else LEVELLED_OFF

    @property
    def ends_in_ruin(self) -> bool:
        """Whether later files are far worse than the base: left out for it, or by more than chance."""
        if any(step > self.checkpoint(self.best_trained).step for step in self.harmful):
            return True
        last = self.trained[-1]
        error = standard_error(self.values[last], [0.0] * self.pictures)
        return self.means[last] > max(RUIN, RUIN_ERRORS * error)

    @property
    def confidence(self) -> str:
        if self.pictures < 2:
            return LOW
        return HIGH if self.pictures >= FEW and len(self.run) <= len(self.trained) / 3 else MEDIUM

    def training_fell(self, place: int) -> bool:
        """Whether the training pictures kept improving after this file until the last."""
        there, last = self.training[place], self.training[self.trained[-1]]
        if not (comparable(there, self.training_base) and comparable(last, self.training_base)):
            return False
        return mean_difference(last, self.training_base) < mean_difference(there, self.training_base)


def _from_curve(
    curve: _Curve, preference: str, likeness: Mapping[str, float], broken: tuple[Checkpoint, ...]
) -> Decision:
    chosen = {FLEXIBLE: curve.safe[0], BALANCED: curve.best, LIKENESS: curve.safe[-1]}[preference]
    alike = [place for place in curve.safe if curve.checkpoint(place).lora_name in likeness]
    if preference == LIKENESS and alike:
        chosen = max(alike, key=lambda place: likeness[curve.checkpoint(place).lora_name])
    kind, safe = curve.kind, tuple(map(curve.checkpoint, curve.safe))
    confidence = LOW if kind == GUESS else curve.confidence
    return Decision(curve.checkpoint(chosen), safe, kind, confidence, _reason(curve, chosen, kind), broken)


def _harmful_steps(ordered: Sequence[Scored], base: Validation) -> list[int]:
    """The steps of weights as trained whose losses are proper and so high that the file was left out."""
    own = (entry for entry in ordered if not entry.checkpoint.average and comparable(entry.score.held_out, base))
    return [entry.checkpoint.step for entry in own if mean_difference(entry.score.held_out, base) > HARMFUL]


def _reason(curve: _Curve, chosen: int, kind: str) -> str:
    name, pictures = _sentence_start(curve.checkpoint(chosen)), _counted(curve.pictures)
    if kind == NOTHING_LEARNED:
        return (
            f"No file is measurably better than the base model on {pictures} kept out of training, so "
            f"{curve.checkpoint(chosen).label} is only a guess: check the captions, the learning rate (too low?), or "
            "add pictures."
        )
    percent = scores.percent_of(curve.means[chosen])
    if kind == GUESS:
        return (
            f"{name} is {percent:.0f} % better than the base model on {pictures} kept out of training, but they differ "
            "so much among themselves that it may be chance: look at the grid, or keep out more pictures."
        )
    sentences = [
        f"{name} is recommended. On {pictures} kept out of training it is {percent:.0f} % better than the base model."
        if curve.is_measurable
        else f"{name} is the least bad. On {pictures} kept out of training no file is measurably better than the base "
        "model: save more often, lower the learning rate, or add pictures."
    ]
    if len(curve.run) > 1:
        first, last = (curve.checkpoint(place).step for place in (curve.run[0], curve.run[-1]))
        sentences.append(
            f"Files {first:,} to {last:,} are equal within measuring error; the earliest is the most flexible."
        )
    if kind == STILL_IMPROVING:
        sentences.append("The last file is still among the best: training stopped early. Train about 50 % longer.")
    elif kind == OVER_TRAINED:
        end = (curve.run or [curve.best_trained])[-1]
        both = curve.training_fell(end)
        happened = "the training pictures kept improving but the kept-out ones" if both else "the kept-out pictures"
        so = "copy more than they learn" if both else "have learned too much of their pictures"
        sentences.append(f"After step {curve.checkpoint(end).step:,} {happened} got worse, so later files {so}.")
    return " ".join(sentences)


def _guess(sound: list[Scored], base: Score, preference: str, broken: tuple[Checkpoint, ...]) -> Decision:
    """The first file with a share of what is gained on the training pictures; the last where nothing was measured."""
    own = [entry for entry in sound if not entry.checkpoint.average] or sound
    measured = [entry for entry in own if comparable(entry.score.training, base.training)]
    if not measured:
        last = own[-1].checkpoint
        reason = f"No pictures were kept out of training, so {last.label}, the last, is only a guess."
        return Decision(last, (last,), GUESS, LOW, reason, broken)
    as_kept_out = [Scored(entry.checkpoint, Score(entry.score.training)) for entry in measured]
    curve = _Curve(as_kept_out, base.training)
    if not curve.is_measurable:
        best = curve.checkpoint(curve.best)
        reason = (
            f"No file is measurably better than the base model even on {_counted(curve.pictures)} that were trained "
            f"on, so {best.label} is only a guess: check the captions, or raise the learning rate."
        )
        return Decision(best, (best,), NOTHING_LEARNED, LOW, reason, broken)
    share = SHARES_OF_GAIN[preference]
    wanted = share * curve.means[curve.best]
    place = next(place for place, mean in enumerate(curve.means) if mean <= wanted)
    chosen = curve.checkpoint(place)
    reason = (
        f"No pictures were kept out, so {chosen.label} is a rough guess from the training pictures: the first file "
        f"with {100 * share:.0f} % of what the best one gains on them."
    )
    return Decision(chosen, (chosen,), GUESS, LOW, reason, broken)


def _least_harm(ordered: list[Scored], base: Score, broken: tuple[Checkpoint, ...]) -> Decision:
    """Of files that all make the losses much higher, the least bad; ValueError when none can be used at all."""

    def harm(entry: Scored) -> float:
        held_out = comparable(entry.score.held_out, base.held_out)
        pair = (entry.score.held_out, base.held_out) if held_out else (entry.score.training, base.training)
        return mean_difference(*pair)

    usable = [
        entry
        for entry in ordered
        if not entry.score.broken
        and (comparable(entry.score.held_out, base.held_out) or comparable(entry.score.training, base.training))
    ]
    if not usable:
        first = ordered[0]
        count = "The LoRA file" if len(ordered) == 1 else f"None of the {len(ordered)} LoRA files"
        cannot = "cannot be used" if len(ordered) == 1 else "can be used"
        raise ValueError(
            f"{count} {cannot} ('{first.checkpoint.lora_name}': {why_broken(first.score, base)}): train again, or "
            "choose other files."
        )
    best = min(usable, key=harm).checkpoint
    reason = (
        f"Every file makes the pictures much worse than the base model does, and {best.label} is only the least bad: "
        "is this the model they were trained on, and are trigger word and captions right?"
    )
    return Decision(best, (best,), NOTHING_LEARNED, LOW, reason, tuple(c for c in broken if c != best))


def _at_step(entries: tuple[Checkpoint, ...], step: int, name: str) -> Checkpoint:
    for entry in entries:
        if entry.step == step:
            return entry
    there = ", ".join(str(entry.step) for entry in entries)
    raise ValueError(f"The run '{name}' has no checkpoint at step {step}: choose one of {there}.")


def _sentence_start(checkpoint: Checkpoint) -> str:
    name = checkpoint.label
    return name[0].upper() + name[1:]


def _counted(pictures: int) -> str:
    return "1 picture" if pictures == 1 else f"{pictures} pictures"
