"""What is asked and how it is judged, each term against the formula written out in its own symbols."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from toys import Batches, Denoiser

from lora_workbench.training.config import ObjectiveConfig
from lora_workbench.training.loop import add_gradients
from lora_workbench.training.objective import Objective

SIZE = 4


def batch_of(count=SIZE, **fields):
    return replace(Batches(count)[0], **fields)


def losses(config=None, batch=None, denoiser=None, *, parts=1):
    denoiser, objective = denoiser or Denoiser(), Objective(config or ObjectiveConfig(), seed=1)
    question = objective.question(denoiser, batch or batch_of(), 3)
    with denoiser.adapted():
        return torch.cat([sum(objective.terms(denoiser, part)) for part in question.parts(parts)]).detach()


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
    mask_preservation=0.6,
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
    random = torch.Generator().manual_seed(4)
    with torch.no_grad():
        denoiser.adapters.values.add_(0.3 * torch.randn(denoiser.adapters.values.shape, generator=random))
    return denoiser


def question_of(config=None, batch=None, denoiser=None, *, number=3, seed=1):
    return Objective(config or ObjectiveConfig(), seed).question(denoiser or Denoiser(), batch or batch_of(), number)


# The question


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_noisy_latents_and_right_answers_are_the_published_ones(prediction):
    """Promise 8: Ho et al. 2020, Salimans & Ho 2022 and Lipman et al. 2022 in their own symbols."""
    batch = batch_of()
    question = question_of(batch=batch, denoiser=Denoiser(prediction))
    x0, noisy, wanted = batch.latents.double(), question.noisy.double(), question.wanted.double()
    level = question.sigma.double().view(-1, 1, 1, 1)
    if prediction == "flow":
        noise = (noisy - (1 - level) * x0) / level
        expected = noise - x0
    else:
        noise, alpha = (noisy - x0) / level, 1 / (1 + level**2).sqrt()
        expected = noise if prediction == "eps" else alpha * noise - (1 - alpha**2).sqrt() * x0
    torch.testing.assert_close(wanted, expected, rtol=1e-5, atol=1e-4)
    assert noise.mean().abs() < 0.1 and (noise.std() - 1).abs() < 0.1
    assert len(set(question.sigma.tolist())) == SIZE and not torch.equal(noise[0], noise[1])


def test_a_question_is_a_function_of_seed_and_number_and_of_nothing_else():
    """Trap 21."""

    denoiser, batch = moved(Denoiser()), told(batch_of())

    def facts(**where):
        question = question_of(EVERYTHING, batch, denoiser, **where)
        return question.noisy, question.sigma, question.wanted, question.kept, question.around

    torch.manual_seed(1)
    first = facts()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert all(map(torch.equal, facts(), first)) and torch.equal(torch.get_rng_state(), before)
    for other in ({"seed": 2}, {"number": 4}):
        assert not any(map(torch.equal, facts(**other), first))


def test_input_perturbation_shows_more_noise_than_is_asked_for():
    """Ning et al. 2023: the target stays the clean noise."""
    plain, perturbed = question_of(), question_of(ObjectiveConfig(input_perturbation=0.1))
    assert torch.equal(plain.wanted, perturbed.wanted) and torch.equal(plain.sigma, perturbed.sigma)
    extra = (perturbed.noisy - plain.noisy) / perturbed.sigma.view(-1, 1, 1, 1)
    assert extra.std().item() == pytest.approx(0.1, rel=0.1)
    assert torch.corrcoef(torch.stack([extra.flatten(), plain.wanted.flatten()]))[0, 1].abs() < 0.1


def test_a_noise_offset_moves_whole_channels_in_question_and_answer():
    plain, offset = question_of(), question_of(ObjectiveConfig(noise_offset=0.5))
    moved_by = offset.wanted - plain.wanted
    torch.testing.assert_close(moved_by, moved_by.mean((2, 3), keepdim=True).expand_as(moved_by), rtol=0, atol=1e-5)
    assert (
        0.2 < moved_by.std() < 1 and len(set(moved_by[:, :, 0, 0].flatten().tolist())) == moved_by[:, :, 0, 0].numel()
    )
    shown = (offset.noisy - plain.noisy) / offset.sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(shown, moved_by, rtol=0, atol=1e-3)


def test_multires_noise_is_coarser_in_question_and_answer():
    batch = replace(batch_of(), latents=torch.zeros(SIZE, 4, 32, 32))
    plain = question_of(batch=batch)
    coarse = question_of(ObjectiveConfig(multires_iterations=6, multires_discount=0.8), batch)

    def likeness_of_neighbours(noise):
        return torch.corrcoef(torch.stack([noise[..., 1:].flatten(), noise[..., :-1].flatten()]))[0, 1].item()

    assert abs(likeness_of_neighbours(plain.wanted)) < 0.05 < 0.2 < likeness_of_neighbours(coarse.wanted)
    torch.testing.assert_close(coarse.noisy, coarse.wanted * coarse.sigma.view(-1, 1, 1, 1), rtol=1e-5, atol=1e-5)


def test_the_levels_are_those_of_the_setting():
    levels = [question_of(ObjectiveConfig(timestep_low=0.9), number=number).sigma for number in range(20)]
    table = Denoiser().sigmas
    assert torch.cat(levels).min() >= table[900] and len(torch.cat(levels).unique()) > 40


@pytest.mark.parametrize("name", ["min_snr_gamma", "debiased"])
def test_a_setting_the_model_cannot_be_trained_with_is_named_before_anything_is_asked(name):
    with pytest.raises(ValueError, match=f"^{name}"):
        question_of(ObjectiveConfig(**{name: 1}), denoiser=Denoiser("flow"))


# The judgement


def answers(denoiser, question, text):
    with denoiser.adapted(), torch.no_grad():
        return denoiser(question.noisy, question.sigma, text, question.batch.size).double()


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_all_terms_apply_in_the_published_order(prediction):
    """Element, mask, mean, weight of the picture, weight of the level (sd-scripts), with every step written out."""
    denoiser, batch = moved(Denoiser(prediction)), told(batch_of())
    config = replace(EVERYTHING, huber_schedule="snr")
    question = question_of(config, batch, denoiser)
    sigma = question.sigma.double()
    c = ((1 - 0.1) / (1 + sigma) ** 2 + 0.1).view(-1, 1, 1, 1)

    def huber(difference):
        return 2 * c * ((difference**2 + c**2).sqrt() - c)

    bare, answer = Denoiser(prediction), answers(denoiser, question, batch.text)
    error = huber(answer - question.wanted.double())
    counted = batch.masks.double().clamp(min=0.1).expand_as(error)
    per_picture = (error * counted).sum((1, 2, 3)) / counted.sum((1, 2, 3))
    moved_outside = huber(answer - answers(bare, question, batch.text))
    masks = batch.masks.double()
    outside = 1 - masks / masks.amax((1, 2, 3), keepdim=True)
    per_picture = per_picture + 0.6 * (moved_outside * outside).mean((1, 2, 3))
    class_text = [text or batch.text[0] for text in batch.class_text]
    drift = huber(answers(denoiser, question, class_text) - answers(bare, question, class_text)).mean((1, 2, 3))
    per_picture = per_picture + 0.7 * drift * torch.tensor([1, 0, 1, 1])
    snr = sigma**-2
    extra = 1 if prediction == "v" else 0
    debiased = 1 / (snr.clamp(max=1000) + 1) if extra else snr.clamp(max=1000) ** -0.5
    expected = per_picture * batch.weights.double() * snr.clamp(max=5) / (snr + extra) * debiased
    ours = losses(config, batch, denoiser)
    torch.testing.assert_close(ours.double(), expected, rtol=1e-5, atol=1e-7)


def test_weights_of_pictures_are_factors_on_their_losses():
    plain = losses()
    weights = torch.tensor([1.0, 2.0, 0.5, 0.0])
    torch.testing.assert_close(losses(batch=batch_of(weights=weights)), plain * weights)


def test_the_text_of_a_question_is_that_which_the_denoiser_has_for_its_batch():
    asked = []

    class Trained(Denoiser):
        def text_of(self, batch):
            asked.append(batch.names)
            return turned(batch)

    def turned(batch):
        return tuple({"cross_attn": entry["cross_attn"].flip(-1)} for entry in batch.text)

    batch = batch_of()
    ours, expected = losses(denoiser=Trained(), parts=2), losses(batch=replace(batch, text=turned(batch)))
    torch.testing.assert_close(ours, expected)
    assert (expected - losses()).abs().max() > 1e-4 * expected.max()
    assert asked == [batch.names[:2], batch.names[2:]]


# Preservation


def test_adapters_that_do_nothing_yet_have_nothing_to_preserve():
    batch = told(batch_of())
    torch.testing.assert_close(losses(ObjectiveConfig(preservation=1), batch), losses(batch=batch))


def test_preservation_is_the_distance_to_the_model_without_adapters_on_the_class_words():
    denoiser, batch = moved(Denoiser()), told(batch_of())
    added = losses(ObjectiveConfig(preservation=2.0), batch, denoiser) - losses(batch=batch, denoiser=denoiser)
    question = question_of(batch=batch)
    class_text = [text or batch.text[0] for text in batch.class_text]
    drift = answers(denoiser, question, class_text) - answers(Denoiser(), question, class_text)
    expected = 2.0 * drift.square().mean((1, 2, 3)) * batch.weights * torch.tensor([1, 0, 1, 1])
    torch.testing.assert_close(added.double(), expected.double(), rtol=1e-3, atol=1e-5)
    assert added[0] > 1e-4


def test_preservation_teaches_the_adapters_and_never_the_model_that_is_kept():
    denoiser, batch = moved(Denoiser()), told(batch_of())
    objective = Objective(ObjectiveConfig(preservation=1.0), 1)
    question = objective.question(denoiser, batch, 3)
    assert not question.kept.requires_grad and question.kept[1].eq(0).all()
    gradients = []
    for config in (ObjectiveConfig(preservation=1.0), ObjectiveConfig()):
        denoiser.adapters.zero_grad()
        with denoiser.adapted():
            asked = question if config.preservation else question_of(batch=batch)
            sum(Objective(config, 1).terms(denoiser, asked)).sum().backward()
        gradients.append(denoiser.adapters.values.grad.clone())
    assert not torch.allclose(*gradients, rtol=1e-3)
    assert not [module for module in denoiser.network.modules() if "forward" in module.__dict__]


def test_the_class_words_go_through_the_text_encoder_that_is_trained_and_the_kept_answer_does_not():
    asked = []

    class Trained(Denoiser):
        def text_of(self, batch):
            asked.append(batch.captions)
            return batch.text

    batch = replace(told(batch_of()), captions=("a", "b", "c", "d"))
    losses(ObjectiveConfig(preservation=1.0), batch, Trained())
    assert asked == [("a", "b", "c", "d"), ("a class",) * 3]


def test_a_batch_without_a_second_question_costs_no_second_answer():
    asked = []

    class Counted(Denoiser):
        def __call__(self, noisy, *rest):
            asked.append(len(noisy))
            return super().__call__(noisy, *rest)

    losses(ObjectiveConfig(preservation=1.0), told(batch_of(), kept=()), Counted())
    assert asked == [4]
    losses(ObjectiveConfig(preservation=1.0), told(batch_of(), kept=(1,)), Counted())
    assert asked == [4, 1, 4, 1]
    asked.clear()
    in_parts = Counted()
    in_parts.parts = 2
    question_of(ObjectiveConfig(preservation=1.0), told(batch_of()), in_parts)
    assert asked == [2, 1], "the answers that are kept are found in parts as well"


@pytest.mark.parametrize(("parts", "kept"), [(1, (0, 2, 3)), (2, (0, 2, 3)), (4, (2,)), (1, ())])
def test_going_backward_from_both_answers_in_turn_gives_the_gradient_of_their_sum(parts, kept):
    """With masks, weights and a loss scale, also where none of a part is preserved."""
    batch, objective, gradients = told(batch_of(), kept), Objective(EVERYTHING, 1), []
    for together in (True, False):
        denoiser = moved(Denoiser())
        denoiser.parts = parts
        if together:
            question = objective.question(denoiser, batch, 3)
            with denoiser.adapted():
                loss = sum(sum(objective.terms(denoiser, part)).sum() for part in question.parts(parts))
            (loss * 64 / SIZE / 2).backward()
        else:
            add_gradients(denoiser, objective, denoiser.adapters, batch, 3, share=64 / 2)
        gradients.append(denoiser.adapters.values.grad.clone())
    assert gradients[0].norm() > 0
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-6)


def test_preservation_never_holds_the_activations_of_both_answers():
    """What the first answer keeps for backward is gone when the second is asked for."""
    kept, alive = [], []

    class Watched(Denoiser):
        def __call__(self, noisy, *rest):
            alive.append(sum(reference() is not None for reference in kept))
            answer = super().__call__(noisy, *rest)
            if answer.requires_grad:
                held = answer * 1  # of a product, both factors are kept for backward
                kept.append(weakref.ref(held))
                return held * held / held.detach()
            return answer

    denoiser = moved(Watched())
    objective, batch = Objective(ObjectiveConfig(preservation=1.0), 1), told(batch_of())
    found = add_gradients(denoiser, objective, denoiser.adapters, batch, 3, share=1.0)
    assert alive == [0, 0, 0] and len(kept) == 2
    expected = losses(ObjectiveConfig(preservation=1.0), batch, moved(Denoiser()))
    torch.testing.assert_close(torch.tensor(found.losses), expected)


def test_preservation_without_class_texts_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^preservation needs captions with class words.*\.$"):
        losses(ObjectiveConfig(preservation=1.0))


# Preservation outside of masks


class Asked(Denoiser):
    """Notes how many examples it is asked about each time, and whether with its adapters."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __call__(self, noisy, *rest):
        self.asked.append((len(noisy), torch.is_grad_enabled()))
        return super().__call__(noisy, *rest)


def with_masks(*shown):
    """A batch whose examples count in that share of their rows, from the top."""
    batch = batch_of(len(shown))
    masks = torch.zeros_like(batch.latents[:, :1])
    for mask, share in zip(masks, shown, strict=True):
        mask[:, : round(share * mask.shape[1])] = 1
    return replace(batch, masks=masks)


KEPT_OUTSIDE = ObjectiveConfig(mask_floor=0.0, mask_preservation=2.0)


def test_outside_of_a_mask_the_answer_is_measured_by_that_of_the_base_to_the_same_text():
    denoiser, batch = moved(Denoiser()), with_masks(0.5, 0.25, 1.0, 0.5)
    added = losses(KEPT_OUTSIDE, batch, denoiser) - losses(ObjectiveConfig(mask_floor=0.0), batch, denoiser)
    question = question_of(batch=batch)
    change = (answers(denoiser, question, batch.text) - answers(Denoiser(), question, batch.text)).square()
    rows = change.shape[2]
    for place, shown in enumerate((0.5, 0.25, 1.0, 0.5)):
        change[place, :, : round(shown * rows)] = 0
    expected = change.mean((1, 2, 3))
    torch.testing.assert_close(added.double(), 2 * expected, rtol=1e-3, atol=1e-5)
    assert added[0] > 1e-4


def test_what_the_picture_shows_outside_of_its_mask_then_has_no_part_in_the_gradient():
    """Only in the noisy latents, of which the network sees all."""
    gradients = []
    for outside in (0.0, 1000.0):
        denoiser, batch = moved(Denoiser()), with_masks(0.5, 0.5)
        question = Objective(KEPT_OUTSIDE, 1).question(denoiser, batch, 3)
        wanted = question.wanted + outside * (1 - batch.masks)
        with denoiser.adapted():
            sum(Objective(KEPT_OUTSIDE, 1).terms(denoiser, replace(question, wanted=wanted))).sum().backward()
        gradients.append(denoiser.adapters.values.grad.clone())
    assert torch.equal(*gradients) and gradients[0].norm() > 0


@pytest.mark.parametrize("level", [254 / 255, 0.5])
def test_a_mask_of_one_brightness_leaves_nothing_out(level):
    """Such as the transparency of a picture that is nearly opaque everywhere."""
    denoiser, batch = moved(Denoiser()), with_masks(1.0, 1.0)
    batch = replace(batch, masks=level * batch.masks)
    assert torch.equal(losses(KEPT_OUTSIDE, batch, denoiser), losses(ObjectiveConfig(mask_floor=0.0), batch, denoiser))


def test_outside_of_a_faint_mask_is_outside_of_a_white_one():
    denoiser, batch = moved(Denoiser()), with_masks(0.5, 0.5)
    faint = replace(batch, masks=0.2 * batch.masks)
    torch.testing.assert_close(losses(KEPT_OUTSIDE, faint, denoiser), losses(KEPT_OUTSIDE, batch, denoiser))


def test_nothing_is_asked_of_the_base_where_masks_leave_nothing_out():
    for batch, expected in (
        (batch_of(), [(4, True)]),
        (with_masks(1.0, 1.0), [(2, True)]),
        (with_masks(1.0, 0.5, 1.0), [(1, False), (3, True)]),
    ):
        denoiser = Asked()
        question = Objective(KEPT_OUTSIDE, 1).question(denoiser, batch, 3)
        with denoiser.adapted():
            list(Objective(KEPT_OUTSIDE, 1).terms(denoiser, question))
        assert denoiser.asked == expected


def test_the_base_is_asked_in_as_many_parts_as_batches_go_through_the_network():
    denoiser = Asked()
    denoiser.parts = 2
    question = Objective(KEPT_OUTSIDE, 1).question(denoiser, with_masks(0.5, 1.0, 0.5, 0.5), 3)
    assert denoiser.asked == [(2, False), (1, False)] and question.around[1].eq(0).all()


# In parts


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
@pytest.mark.parametrize("parts", [2, 3, 4, 9])
def test_a_batch_in_parts_gives_the_losses_of_the_whole(prediction, parts):
    config = EVERYTHING if prediction != "flow" else replace(EVERYTHING, min_snr_gamma=0, debiased=False)
    denoiser = moved(Denoiser(prediction))
    whole = losses(config, told(batch_of()), denoiser)
    in_parts = losses(config, told(batch_of()), denoiser, parts=parts)
    torch.testing.assert_close(in_parts, whole, rtol=1e-6, atol=1e-7)


# On a device


class WithoutFloat64(TorchDispatchMode):
    """Refuses float64 on the meta device, as Apple's and Intel's GPUs do on theirs."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta and tensor.dtype == torch.float64:
                raise TypeError(f"{function} made float64 on the device")
        return result


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
@pytest.mark.parametrize("config", [ObjectiveConfig(preservation=1.0), EVERYTHING], ids=["plain", "everything"])
def test_a_device_without_float64_can_be_trained_on(prediction, config):
    class Elsewhere(Denoiser):
        device = torch.device("meta")

        def __call__(self, noisy, sigma, text, size):
            assert noisy.device == sigma.device == self.device
            return noisy.clone().requires_grad_(torch.is_grad_enabled())

    config = replace(config, min_snr_gamma=0, debiased=False) if prediction == "flow" else config
    denoiser, objective = Elsewhere(prediction), Objective(config, 1)
    with WithoutFloat64():
        question = objective.question(denoiser, told(batch_of()), 3)
        found = [term for part in question.parts(2) for term in objective.terms(denoiser, part)]
        sum(term.sum() for term in found).backward()
    assert all(term.is_meta for term in found)
