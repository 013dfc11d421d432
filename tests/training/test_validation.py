from dataclasses import replace

import pytest
import torch
from toys import Batches, Denoiser

from lora_workbench.training.noise import FLOW
from lora_workbench.training.timesteps import VALIDATION_PLACES
from lora_workbench.training.validation import validation_loss


def pictures(count=3):
    return [Batches()[number] for number in range(count)]


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_there_is_one_finite_loss_for_each_picture_and_each_of_four_levels(prediction):
    losses = validation_loss(Denoiser(prediction), pictures())
    assert [len(levels) for levels in losses] == [4, 4, 4]
    assert all(loss > 0 and torch.tensor(loss).isfinite() for levels in losses for loss in levels)


def test_the_same_weights_always_get_the_same_answer_whatever_was_drawn_before():
    torch.manual_seed(1)
    first = validation_loss(Denoiser(), pictures())
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert validation_loss(Denoiser(), pictures()) == first
    denoiser = Denoiser()
    before = torch.get_rng_state()
    validation_loss(denoiser, pictures())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_picture_gets_the_same_answer_however_many_follow_it():
    assert validation_loss(Denoiser(), pictures(1)) == validation_loss(Denoiser(), pictures(3))[:1]


def test_each_level_gets_the_answer_it_would_get_alone():
    denoiser, (picture,) = Denoiser(FLOW), pictures(1)
    (together,) = validation_loss(denoiser, [picture])

    class OneByOne:
        prediction, sigmas, device, adapted = denoiser.prediction, denoiser.sigmas, denoiser.device, denoiser.adapted
        text_of = denoiser.text_of

        def __call__(self, noisy, sigma, text, size):
            assert len(text) == len(sigma) == 4 and size == picture.size
            return torch.cat([denoiser(noisy[i : i + 1], sigma[i : i + 1], text[i : i + 1], size) for i in range(4)])

    (apart,) = validation_loss(OneByOne(), [picture])
    assert together == pytest.approx(apart, rel=1e-5)


def test_other_levels_can_be_asked_about_and_each_is_answered_for_itself():
    (four,), (six,) = (
        validation_loss(Denoiser(FLOW), pictures(1), levels=levels)
        for levels in (VALIDATION_PLACES, (0.1, *VALIDATION_PLACES, 0.95))
    )
    assert len(six) == 6 and six[1:5] == pytest.approx(four, rel=1e-5)
    assert validation_loss(Denoiser(FLOW), pictures(1)) == [four]


def test_it_sees_the_adapters_and_keeps_nothing_for_backward():
    denoiser = Denoiser()
    before = validation_loss(denoiser, pictures())
    with torch.no_grad():
        for adapter in denoiser.adapters:
            adapter.up.add_(0.1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        after = validation_loss(denoiser, pictures())
    assert after != before and kept == []
    assert not [module for module in denoiser.network.modules() if "forward" in module.__dict__]


def test_no_pictures_no_losses():
    assert validation_loss(Denoiser(), []) == []


def test_what_a_mask_leaves_out_counts_the_floor():
    batch = Batches()[0]
    blank, left = torch.zeros(1, 1, *batch.latents.shape[2:]), torch.zeros(1, 1, *batch.latents.shape[2:])
    left[..., : left.shape[-1] // 2] = 1

    def loss(masks, floor):
        return validation_loss(Denoiser(), [replace(batch, masks=masks)], floor)[0]

    (plain,) = validation_loss(Denoiser(), [batch])
    inside, outside = loss(left, 0), loss(1 - left, 0)
    assert loss(blank, 0) == [0.0] * 4
    assert loss(torch.ones_like(left), 0.5) == pytest.approx(plain) == loss(left, 1)
    assert inside != pytest.approx(plain, rel=1e-3)
    expected = [(a + 0.25 * b) / 1.25 for a, b in zip(inside, outside, strict=True)]
    assert loss(left, 0.25) == pytest.approx(expected, rel=1e-5)


def test_the_text_is_that_which_the_denoiser_has_for_the_picture():
    """A trained text encoder answers anew for each checkpoint."""
    told = []

    class Trained(Denoiser):
        def text_of(self, batch):
            told.append(batch.names)
            return [{"cross_attn": entry["cross_attn"] * 2} for entry in batch.text]

    (picture,) = pictures(1)
    doubled = replace(picture, text=tuple({"cross_attn": entry["cross_attn"] * 2} for entry in picture.text))
    assert validation_loss(Trained(), [picture]) == validation_loss(Denoiser(), [doubled])
    assert told == [picture.names], "one encoding does for all levels"
