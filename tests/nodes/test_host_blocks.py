"""Strengths of a LoRA by block, against a dense computation by hand."""

import comfy.lora
import pytest
import queueing
import stacktoys
import torch
from stacktoys import ADAPTERS, apply, chained, weights, write

from lora_workbench.nodes.host.blocks import block_strengths
from lora_workbench.nodes.host.loras import read_lora
from lora_workbench.nodes.stack_apply import LoraWorkbenchStackApply
from lora_workbench.training.patterns import last_match

pytestmark = pytest.mark.comfy
NAME = "one.safetensors"


def row(blocks, strength=1.0):
    return f'[{{"lora": "{NAME}", "model": {strength}, "clip": {strength}, "blocks": "{blocks}"}}]'


@pytest.mark.parametrize(
    "text, key, strength",
    [
        ("IN04=0.5", "diffusion_model.input_blocks.4.1.proj_in.weight", 0.5),
        ("in4 = 0.5", "diffusion_model.input_blocks.4.1.proj_in.weight", 0.5),
        ("IN04=0.5", "diffusion_model.input_blocks.40.1.proj_in.weight", None),
        ("IN04=0.5", "diffusion_model.output_blocks.4.1.proj_in.weight", None),
        ("OUT00-OUT05=1.2", "diffusion_model.output_blocks.5.0.weight", 1.2),
        ("OUT00-05=1.2", "diffusion_model.output_blocks.3.0.weight", 1.2),
        ("OUT00-OUT05=1.2", "diffusion_model.output_blocks.6.0.weight", None),
        ("MID=0", "diffusion_model.middle_block.1.weight", 0.0),
        ("M00=0", "diffusion_model.middle_block.1.weight", 0.0),
        ("D00-D09=.5", "diffusion_model.double_blocks.9.img_attn.qkv.weight", 0.5),
        ("S*=0", "diffusion_model.single_blocks.37.linear1.weight", 0.0),
        ("S*=0", "diffusion_model.double_blocks.3.img_mlp.0.weight", None),
        ("TE=0.3", "clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight", 0.3),
        ("BASE=0.3", "t5xxl.transformer.encoder.block.0.layer.0.weight", 0.3),
        ("TE=0.3", "diffusion_model.middle_block.1.weight", None),
        ("IN04=0.5, IN*=0.25", "diffusion_model.input_blocks.4.1.proj_in.weight", 0.25),
        ("IN*=0.25\nIN04=0.5,", "diffusion_model.input_blocks.4.1.proj_in.weight", 0.5),
        ("attn1=0.4, MID=0", "diffusion_model.input_blocks.4.1.attn1.to_q.weight", 0.4),
        (r"blocks\.\d{1,2}\.=0.4, TE=1", "diffusion_model.double_blocks.13.img_mlp.0.weight", 0.4),
        ("", "diffusion_model.middle_block.1.weight", None),
    ],
)
def test_blocks_are_called_as_elsewhere_and_the_last_that_fits_counts(text, key, strength):
    assert last_match(block_strengths(text), key) == strength


@pytest.mark.parametrize(
    "text, said",
    [
        ("IN04", "'IN04', which must say 'block = number'"),
        ("IN04=0.5, MID", "'MID', which must say 'block = number'"),
        ("IN04=half", "'IN04=half', which must say 'block = number'"),
        ("IN04=0.5 MID=1", "'IN04=0.5 MID=1', which must say 'block = number'"),
        ("=1", "'=1', which must say 'block = number'"),
        ("MID=1, IN04=-1", "has 'IN04=-1', whose number must be between 0 and 100"),
        ("IN04=101", "has 'IN04=101', whose number must be between 0 and 100"),
        ("(=1", "which is no regular expression"),
        (r"(\w+\.?)+!=1", "which could take minutes to look for"),
        ("MID=1," * 1000, "5,999 characters: write at most 4,000"),
    ],
)
def test_what_cannot_be_read_is_named(text, said):
    with pytest.raises(ValueError, match="^blocks has ") as refusal:
        block_strengths(text)
    assert said in str(refusal.value)


def test_blocks_that_cannot_be_read_are_named_before_anything_runs(folder):
    write(folder, NAME, "sdxl", every=40)
    check = LoraWorkbenchStackApply.validate_inputs
    assert check(rows=row("MID=0")) is True
    assert "blocks has 'MID', which must say" in check(rows=row("MID"))


@pytest.mark.parametrize(
    "kind, blocks",
    [
        ("sdxl", {"IN04": 0.5, "MID": 0.0, "OUT00-OUT01": 1.2, "TE": 0.3, "IN00": 2.0}),
        ("flux", {"D01": 0.5, "S*": 0.0, "TE": 0.3, "img_mlp": 1.5}),
    ],
)
def test_each_weight_gets_the_change_of_its_block(kind, blocks, folder):
    """W + strength x block x alpha / rank x up x down, by hand and in float64, for every weight of MODEL and CLIP."""
    write(folder, NAME, kind)
    model, clip, _ = queueing.shared_models(kind)
    weights(model), weights(clip.patcher)  # without what another test has put on
    before = {**model.model.state_dict(), **clip.cond_stage_model.state_dict()}
    before = {key: weight.clone() for key, weight in before.items()}
    text = ", ".join(f"{name}={factor}" for name, factor in blocks.items())
    result = apply(model, clip, rows=row(text, 0.8))
    expected = by_hand(kind, before, read_lora(folder / NAME), blocks, 0.8)
    weights(result["model"]), weights(result["clip"].patcher)
    after = {**result["model"].model.state_dict(), **result["clip"].patcher.model.state_dict()}
    for key, change in expected.items():
        found = after[key].double() - before[key].double()
        assert (found - change).norm() <= 1e-5 * max(change.norm(), before[key].double().norm()), key
    untouched = before.keys() - expected.keys()
    assert untouched and all(torch.equal(after[key], before[key]) for key in untouched)
    still = {key for key, change in expected.items() if not change.any()}
    assert still and all(torch.equal(after[key], before[key]) for key in still)


def by_hand(kind, before, tensors, blocks, strength):
    """The change of every weight, with the blocks told apart by nothing but the beginnings of their names."""
    model, clip, _ = queueing.shared_models(kind)
    keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, comfy.lora.model_lora_keys_unet(model.model, {}))
    starts = {
        "IN00": ["diffusion_model.input_blocks.0."],
        "IN04": ["diffusion_model.input_blocks.4."],
        "MID": ["diffusion_model.middle_block."],
        "OUT00-OUT01": ["diffusion_model.output_blocks.0.", "diffusion_model.output_blocks.1."],
        "D01": ["diffusion_model.double_blocks.1."],
        "S*": ["diffusion_model.single_blocks."],
        "TE": ["clip_", "t5xxl."],
    }
    changes = {}
    for name in stacktoys.places(kind):
        key, factor = keys[name], 1.0
        for block, number in blocks.items():
            if any(key.startswith(start) for start in starts.get(block, ())) or (block == "img_mlp" and block in key):
                factor = number
        up, down = (tensors[f"{name}.lora_{side}.weight"].double().flatten(1) for side in ("up", "down"))
        scale = strength * factor * stacktoys.ALPHA / stacktoys.RANK
        changes[key] = (scale * up @ down).view(before[key].shape)
    return changes


@pytest.mark.parametrize("depth", ["short", "off"])
def test_the_report_says_how_many_layers_the_blocks_reach(depth, folder):
    write(folder, NAME, "flux", every=4)
    places = list(stacktoys.places("flux"))[::4]
    single = sum("single_blocks" in name for name in places)
    for blocks, reached in (("S*=0.5", single), ("D77=0", 0)):
        report = apply(*queueing.shared_models("flux")[:2], rows=row(blocks), xray=depth)["report"]
        assert f"blocks set the strength of {reached} of {len(places)} layers" in report
    assert 0 < single < len(places)


def test_blocks_that_fit_no_layer_are_named_beside_those_that_do(folder):
    """ "MD" is a pattern as any other, so only what it fits shows that it was mistyped."""
    write(folder, NAME, "sdxl", every=4)
    model, clip, _ = queueing.shared_models("sdxl")
    report = apply(model, clip, rows=row("OUT*=0.5, MD=0, D00=0, TE=1"))["report"]
    assert "layers; no layer fits MD or D00" in report
    assert "no layer fits" not in apply(model, clip, rows=row("OUT*=0.5, TE=1"))["report"]


@pytest.mark.parametrize("kind", stacktoys.KINDS)
def test_blocks_that_are_all_1_change_nothing_and_all_0_leave_the_model_alone(kind, folder):
    write(folder, NAME, kind, adapters=ADAPTERS, every=3)
    model, clip, _ = queueing.shared_models(kind)
    theirs = chained(model, clip, [(NAME, 0.7, 0.7)])
    ours = apply(model, clip, rows=row(".=1", 0.7))
    assert weights(ours["model"]) == weights(theirs[0]) != weights(model)
    assert weights(ours["clip"].patcher) == weights(theirs[1].patcher)
    nothing = apply(model, clip, rows=row(".=0", 0.7))
    assert weights(nothing["model"]) == weights(model)
    assert weights(nothing["clip"].patcher) == weights(clip.patcher)
