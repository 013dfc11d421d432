"""What is asked and how it is judged, each term against the formula written out in its own symbols."""

from dataclasses import replace

import pytest
import torch
from toys import Batches, Denoiser

from lora_workbench.training.config import ObjectiveConfig
from lora_workbench.training.objective import Objective

SIZE = 4


def batch_of(count=SIZE, **fields):
    return replace(Batches(count)[0], **fields)


def losses(config=None, batch=None, denoiser=None, *, number=3, seed=1, parts=1):
    denoiser, objective = denoiser or Denoiser(), Objective(config or ObjectiveConfig(), seed)
    question = objective.question(denoiser, batch or batch_of(), number)
    with denoiser.adapted():
        return torch.cat([objective.losses(denoiser, part) for part in question.parts(parts)]).detach()


EVERYTHING = ObjectiveConfig(
    loss="huber",
    min_snr_gamma=5,
    debiased=True,
    noise_offset=0.1,
    multires_iterations=4,
    input_perturbation=0.1,
    stratify=8,
    timesteps="content",
    timestep_low=0.1,
    preservation=0.7,
)


def told(batch, kept=(0, 2, 3)):
    """The batch with masks, weights and class texts for the examples at some places."""
    random = torch.Generator().manual_seed(9)
    shape = (len(batch.names), 1, *batch.latents.shape[2:])
    other = Batches(len(batch.names))[1].text
    return replace(
        batch,
        masks=(torch.rand(shape, generator=random) - 0.5).clamp(min=0),
        weights=torch.rand(len(batch.names), generator=random) + 0.5,
        class_captions=tuple("a class" if place in kept else "" for place in range(len(batch.names))),
        class_text=tuple(text if place in kept else None for place, text in enumerate(other)),
    )


def moved(denoiser):
    """The denoiser with adapters that do something."""
    with torch.no_grad():
        denoiser.adapters.values.add_(0.05 * torch.randn(denoiser.adapters.values.shape))
    return denoiser


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
@pytest.mark.parametrize("parts", [2, 3, 4, 9])
def test_a_batch_in_parts_gives_the_losses_of_the_whole(prediction, parts):
    config = EVERYTHING if prediction != "flow" else replace(EVERYTHING, min_snr_gamma=0, debiased=False)
    denoiser = moved(Denoiser(prediction))
    whole = losses(config, told(batch_of()), denoiser)
    in_parts = losses(config, told(batch_of()), denoiser, parts=parts)
    torch.testing.assert_close(in_parts, whole, rtol=1e-6, atol=1e-7)
