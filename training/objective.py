"""What the network is asked in training, and how its answer is judged.

A question is everything random about a micro-batch: noise levels, noise, and with them the noisy latents and the right
answer. It is drawn for the whole batch as a function of (seed, number), and can then be asked in parts.

Preservation (ai-toolkit's "differential output preservation") asks a second time with the trigger word replaced by the
class words, where the right answer is that of the network without adapters: the class stays what it was. It is judged
as the first answer is, but over the whole picture, and added to it with its weight. Regularization pictures and
captions without the trigger word have no second question.

Preservation outside of masks (OneTrainer's "masked prior preservation") asks nothing more of the adapters: their
answer is judged outside of the mask by that of the network without adapters to the same text, and added with its
weight. The mean is over the whole picture, so that an element outside never counts more than one inside. Without it
nothing keeps the surroundings from changing with what is learned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .batches import Batch
from .config import ObjectiveConfig
from .losses import check, element_errors, huber_threshold, level_weights, mean_errors, outside
from .noise import generator, mix, multires, noise_like, target, with_offset
from .timesteps import training_sigmas

if TYPE_CHECKING:
    from .loop import Denoiser


@dataclass(frozen=True)
class Question:
    """The noisy latents of a batch and what the right answers are, each (B, C, h, w), at noise levels `sigma` (B,)."""

    batch: Batch
    noisy: Tensor
    sigma: Tensor
    wanted: Tensor
    counts: Tensor
    """What the noise level of each example counts (B,)."""
    kept: Tensor | None = None
    """What the network without adapters answers to the class words, 0 for examples that have none; None when it is not
    asked."""
    around: Tensor | None = None
    """What it answers to the same text, 0 for examples whose mask leaves nothing out; None when it is not asked."""

    def __len__(self) -> int:
        return len(self.sigma)

    def parts(self, count: int) -> list[Question]:
        """The question in `count` parts as equal as can be, no more than it has examples, in their order."""
        if min(count, len(self)) == 1:
            return [self]
        places = torch.arange(len(self)).tensor_split(min(count, len(self)))
        return [self.at(some.tolist()) for some in places]

    def at(self, places: Sequence[int]) -> Question:
        """The question about the examples at some places only."""
        chosen = list(places)
        own = (tensor[chosen] for tensor in (self.noisy, self.sigma, self.wanted, self.counts))
        bases = (None if tensor is None else tensor[chosen] for tensor in (self.kept, self.around))
        return Question(self.batch.at(chosen), *own, *bases)


class Objective:
    """How a training asks and judges; every random choice is a function of (seed, number)."""

    def __init__(self, config: ObjectiveConfig, seed: int) -> None:
        self.config, self.seed = config, seed

    def question(self, denoiser: Denoiser, batch: Batch, number: int) -> Question:
        """The question of micro-batch `number`, made once for the whole batch.

        ValueError naming the setting that the model or the batch cannot be trained with.
        """
        config, seed = self.config, self.seed
        check(config, denoiser.prediction)
        sigma = training_sigmas(config, denoiser.sigmas, len(batch.latents), batch.size, seed, number)
        noise = self._noise(batch.latents, number)
        shown = noise
        if config.input_perturbation:
            shown = noise + config.input_perturbation * noise_like(noise, seed, "input perturbation", number)
        # Before anything is on the device: Apple's and Intel's GPUs have no float64.
        counts = level_weights(config, denoiser.prediction, sigma)
        drawn = batch.latents, sigma, noise, shown, counts
        latents, sigma, noise, shown, counts = (x.to(denoiser.device) for x in drawn)
        noisy = mix(denoiser.prediction, latents, shown, sigma)
        question = Question(batch, noisy, sigma, target(denoiser.prediction, latents, noise, sigma), counts)
        return replace(question, kept=self._kept(denoiser, question), around=self._around(denoiser, question))

    def terms(self, denoiser: Denoiser, question: Question) -> Iterator[Tensor]:
        """The loss of each example (B,), with all that weighs it and with gradient; then what preservation adds to it.

        Inside `denoiser.adapted()`. The class words are asked about when the second term is: whoever goes backward
        from the first before that never holds the memory of both answers.
        """
        batch, levels = question.batch, question.counts
        # Whatever comes from main memory waits for the device, so it comes before the network has to do.
        pictures = batch.weights.to(levels)
        masks = None if batch.masks is None else batch.masks.to(levels.device)
        yield self._missed(denoiser, question, masks) * pictures * levels
        if question.kept is not None and _preserved(batch):
            yield self.config.preservation * self._drift(denoiser, question) * pictures * levels

    def _noise(self, latents: Tensor, number: int) -> Tensor:
        config, seed = self.config, self.seed
        noise = noise_like(latents, seed, "noise", number)
        if config.noise_offset:
            noise = with_offset(noise, config.noise_offset, generator(seed, "noise offset", number))
        if config.multires_iterations:
            rng = generator(seed, "multires noise", number)
            noise = multires(noise, config.multires_iterations, config.multires_discount, rng)
        return noise

    def _kept(self, denoiser: Denoiser, question: Question) -> Tensor | None:
        if not self.config.preservation:
            return None
        return _of_base(denoiser, question, _preserved(question.batch), Batch.of_class)

    def _around(self, denoiser: Denoiser, question: Question) -> Tensor | None:
        masks = question.batch.masks
        if not self.config.mask_preservation or masks is None:
            return None
        return _of_base(denoiser, question, outside(masks).flatten(1).amax(1).nonzero().flatten().tolist())

    def _errors(self, denoiser: Denoiser, answer: Tensor, wanted: Tensor, sigma: Tensor) -> Tensor:
        """The error of every element (B, C, h, w), before weights."""
        return element_errors(self.config, answer, wanted, huber_threshold(self.config, sigma, denoiser.sigmas))

    def _missed(self, denoiser: Denoiser, question: Question, masks: Tensor | None) -> Tensor:
        """How far each answer (B,) is from the right one, and outside of its mask from that of the base."""
        config, sigma = self.config, question.sigma
        answer = denoiser(question.noisy, sigma, denoiser.text_of(question.batch), question.batch.size)
        missed = mean_errors(self._errors(denoiser, answer, question.wanted, sigma), masks, config.mask_floor)
        if question.around is None:
            return missed
        moved = self._errors(denoiser, answer, question.around, sigma) * outside(masks)
        return missed + config.mask_preservation * mean_errors(moved)

    def _drift(self, denoiser: Denoiser, question: Question) -> Tensor:
        """How far each answer (B,) to the class words has moved; 0 for examples without a second question."""
        drift, places = torch.zeros_like(question.sigma), _preserved(question.batch)
        some = question.at(places)
        batch = some.batch.of_class()
        answer = denoiser(some.noisy, some.sigma, denoiser.text_of(batch), batch.size)
        drift[places] = mean_errors(self._errors(denoiser, answer, some.kept, some.sigma))
        return drift


def _of_base(
    denoiser: Denoiser, question: Question, places: Sequence[int], told: Callable[[Batch], Batch] = lambda batch: batch
) -> Tensor:
    """What the network without adapters answers about the examples at `places`, each told as `told` says; else 0.

    In as many parts as batches go through it.
    """
    found = torch.zeros_like(question.wanted)
    if places:
        parts = question.at(places).parts(denoiser.parts)
        with denoiser.base():
            answers = [denoiser(part.noisy, part.sigma, told(part.batch).text, part.batch.size) for part in parts]
        found[places] = torch.cat(answers).to(found)
    return found


def _preserved(batch: Batch) -> list[int]:
    """The places in a batch of the examples that have a second question."""
    if batch.class_text is None:
        raise ValueError(
            "preservation needs captions with class words, and this dataset was encoded without: queue again, or set "
            "preservation to 0."
        )
    return [place for place, text in enumerate(batch.class_text) if text is not None]
