"""The x-ray of a stack, against changes that are multiplied out and weights that are read whole."""

import json
import math
from itertools import combinations

import comfy.lora
import comfy.utils
import hosttoys
import pytest
import queueing
import torch

from lora_workbench.nodes.host import changes, weight_norms, xray
from lora_workbench.nodes.host.patches import called, holder, key_map, place_of
from lora_workbench.nodes.host.xray import Applied
from lora_workbench.training.config import LoraConfig
from lora_workbench.training.lora import Adapters
from lora_workbench.training.lora_file import file_tensors
from lora_workbench.training.memory import MemoryPlan
from lora_workbench.training.patterns import overrides

pytestmark = pytest.mark.comfy
every_model = pytest.mark.parametrize("model", ["sdxl", "flux"])
SPREAD = {"lora": 0.1, "dora": 0.1, "loha": 0.4, "lokr": 0.3, "oft": 0.1}
TEXT = "lora_te1_text_model_encoder_layers_0_mlp_fc1"


def file_of(model, kind="lora", seed=0, rank=3, text=False):
    """The tensors of a file for every layer of a toy, in kohya's names; with `text` one layer of CLIP-L too."""
    denoiser = hosttoys.loaded(queueing.shared_models(model)[0])
    adapters = Adapters.build([hosttoys.part(denoiser)], LoraConfig(rank=rank, alpha=1.5, kind=kind), seed)
    denoiser.prepare(adapters, MemoryPlan())
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters:
            for name, tensor in adapter.tensors.items():
                noise = torch.randn(tensor.shape, generator=random) * SPREAD[kind]
                tensor.copy_(tensor * (1 + noise) if name == "magnitude" else noise)
    tensors = file_tensors(adapters.state(), adapters.config, torch.float32)
    if text:
        tensors[f"{TEXT}.lora_down.weight"] = torch.randn(rank, 64, generator=random)
        tensors[f"{TEXT}.lora_up.weight"] = torch.randn(128, rank, generator=random)
    return {name: tensor.clone() for name, tensor in tensors.items()}


def split_file(seed=0):
    """A FLUX file with diffusers' names: parts of the weights that kohya's files change as a whole."""
    random = torch.Generator().manual_seed(seed)
    sizes = {"attn.to_q": (96, 96), "attn.to_v": (96, 96), "proj_mlp": (384, 96), "proj_out": (96, 480)}
    sizes = {f"transformer.single_transformer_blocks.0.{name}": size for name, size in sizes.items()}
    sizes |= {f"transformer.transformer_blocks.0.attn.{name}": (96, 96) for name in ("to_q", "to_k", "to_out.0")}
    tensors = {}
    for name, (rows, columns) in sizes.items():
        tensors[f"{name}.lora_A.weight"] = 0.1 * torch.randn(2, columns, generator=random)
        tensors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(rows, 2, generator=random)
    return tensors


def put_on(model, files, strengths=None, clip=True, **more):
    """What Stack Apply hands over for these files."""
    patcher, encoder, _ = queueing.shared_models(model)
    keys = key_map(patcher, encoder if clip else None)
    strengths = strengths or {}
    return [
        Applied(
            name,
            tensors,
            comfy.lora.load_lora(tensors, keys, log_missing=False),
            *strengths.get(name, (1.0, 1.0)),
            {},
            (name, sum(float(tensor.double().sum()) for tensor in tensors.values())),
            **more,
        )
        for name, tensors in files.items()
    ]


def look(model, applied, depth="short", clip=True):
    patcher, encoder, _ = queueing.shared_models(model)
    with torch.inference_mode():
        return xray.xray(patcher, encoder if clip else None, applied, depth)


def dense(model, one):
    """By weight: the weight, and what ComfyUI makes of it with this LoRA at its strength, less the weight."""
    patcher, encoder, _ = queueing.shared_models(model)
    found = {}
    for target, patch in one.patches.items():
        key, place = place_of(target)
        weight = comfy.utils.get_attr(holder(key, patcher, encoder).model, key).float()
        before, change = found.get(key, (weight, torch.zeros_like(weight)))
        entry = (one.strength(key), patch, 1.0, *(place or (None, None)))
        found[key] = before, change + comfy.lora.calculate_weight([entry], weight.clone(), key) - weight
    return found


def norm(tensors):
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


@pytest.fixture
def work(monkeypatch):
    """How often something was measured: inner products, and weights."""
    done = []
    for module, name in ((changes, "_computed"), (weight_norms, "_estimated")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given, real=real, name=name: done.append(name) or real(*given))
    return done


def mixed(model):
    return {kind: file_of(model, kind, seed, text=seed == 0) for seed, kind in enumerate(SPREAD)}


# Norms and cosines


@every_model
def test_norms_are_those_of_the_changes_multiplied_out(model):
    applied = put_on(model, mixed(model), {"lora": (0.7, 0.3), "loha": (-0.4, 1.0), "dora": (1.3, 1.0)})
    for one, row in zip(applied, look(model, applied, "full").rows, strict=True):
        changed = dense(model, one)
        assert row.norm == pytest.approx(norm(change for _, change in changed.values()), rel=1e-3)
        assert row.relative_norm == pytest.approx(row.norm / norm(weight for weight, _ in changed.values()), rel=0.02)
        assert row.keys == row.keys_in_file == len(changed)


@every_model
def test_cosines_are_those_of_the_changes_multiplied_out(model):
    files = mixed(model) | {"again": file_of(model, "lora", 9)}
    files["again"] = {name: tensor + 0.5 * files["lora"][name] for name, tensor in files["again"].items()}
    applied = put_on(model, files, {"lora": (0.7, 0.3), "loha": (-0.4, 1.0)})
    changed = {one.name: dense(model, one) for one in applied}
    overlaps = {(overlap.a, overlap.b): overlap for overlap in look(model, applied, "full").overlaps}
    assert overlaps.keys() == set(combinations(files, 2))
    assert overlaps["lora", "again"].cosine > 0.15
    for (a, b), overlap in overlaps.items():
        both = changed[a].keys() & changed[b].keys()
        left, right = (torch.cat([changed[name][key][1].flatten() for key in both]) for name in (a, b))
        assert overlap.cosine == pytest.approx(torch.cosine_similarity(left, right, 0).item(), abs=1e-4)
        assert overlap.shared == len(both)


def test_parts_of_a_weight_meet_the_whole_of_it():
    applied = put_on("flux", {"fused": file_of("flux"), "split": split_file(1), "split too": split_file(2)})
    changed = [dense("flux", one) for one in applied]
    found = look("flux", applied)
    for number, row in enumerate(found.rows):
        assert row.norm == pytest.approx(norm(change for _, change in changed[number].values()), rel=1e-4)
    for (a, b), overlap in zip(((0, 1), (0, 2), (1, 2)), found.overlaps, strict=True):
        both = changed[a].keys() & changed[b].keys()
        left, right = (torch.cat([changed[one][key][1].flatten() for key in both]) for one in (a, b))
        assert overlap.cosine == pytest.approx(torch.cosine_similarity(left, right, 0).item(), abs=1e-5)


def test_a_part_is_compared_with_that_part_of_the_weight():
    (one,) = put_on("flux", {"split": split_file()})
    row = look("flux", [one]).rows[0]
    parts = []
    for target in one.patches:
        key, place = place_of(target)
        weight = comfy.utils.get_attr(queueing.shared_models("flux")[0].model, key).float()
        parts.append(weight if place is None else weight.narrow(*place[0]))
    assert len(parts) == 7
    assert row.relative_norm == pytest.approx(row.norm / norm(parts), rel=0.01)


@every_model
def test_the_short_x_ray_measures_plain_loras_as_the_full_one_does(model):
    applied = put_on(model, {"one": file_of(model, text=True), "two": file_of(model, seed=1)})
    assert look(model, applied).table() == look(model, applied, "full").table()


def test_the_short_x_ray_multiplies_nothing_out(monkeypatch):
    monkeypatch.setattr(changes, "_dense", lambda *_: pytest.fail("a change was multiplied out"))
    applied = put_on("sdxl", {kind: file_of("sdxl", kind, 20 + seed) for seed, kind in enumerate(SPREAD)})
    rows = {row.name: row for row in look("sdxl", applied).rows}
    assert rows["loha"].norm is None and rows["dora"].norm is None
    assert "measured only by the full x-ray" in rows["loha"].note
    assert rows["lokr"].norm == pytest.approx(norm(c for _, c in dense("sdxl", applied[3]).values()), rel=1e-4)


# Fights


def test_layers_over_which_two_fight_are_named_worst_first():
    one = file_of("sdxl")
    two = {name: tensor.clone() for name, tensor in file_of("sdxl", seed=1).items()}
    layers = [name.removesuffix(".alpha") for name in one if name.endswith(".alpha")]
    for layer, factor in ((layers[3], -20.0), (layers[7], -1.0)):
        two[f"{layer}.lora_up.weight"] = factor * one[f"{layer}.lora_up.weight"]
        two[f"{layer}.lora_down.weight"] = one[f"{layer}.lora_down.weight"].clone()
    applied = put_on("sdxl", {"one": one, "two": two})
    keys = key_map(queueing.shared_models("sdxl")[0], None)
    expected = [called(keys[layer]) for layer in (layers[3], layers[7])]
    (overlap,) = look("sdxl", applied).overlaps
    assert list(overlap.layers[:2]) == expected
    assert f"they fight over {expected[0]}, {expected[1]}" in str(overlap)
    (turned,) = look("sdxl", put_on("sdxl", {"one": one, "two": two}, {"two": (-1.0, 1.0)})).overlaps
    assert not set(expected) & set(turned.layers)
    assert turned.cosine == pytest.approx(-overlap.cosine)


def test_weights_that_both_change_much_are_named():
    one = {name: 0.1 * tensor for name, tensor in file_of("sdxl").items()}
    layer = next(name for name in one if name.endswith(".alpha")).removesuffix(".alpha")
    one[f"{layer}.lora_up.weight"] *= 1000
    two = {name: tensor.clone() for name, tensor in one.items()}
    (overlap,) = look("sdxl", put_on("sdxl", {"one": one, "two": two})).overlaps
    assert overlap.cosine == pytest.approx(1.0, abs=1e-5)
    assert list(overlap.both_large) == [called(key_map(queueing.shared_models("sdxl")[0], None)[layer])]
    assert "they do much the same, so lower both" in str(overlap)


def test_loras_of_different_layers_do_not_overlap():
    layers = file_of("sdxl")
    halves = [{name: t for name, t in layers.items() if ("attn1" in name) == side} for side in (True, False)]
    assert all(halves)
    assert look("sdxl", put_on("sdxl", dict(zip("ab", halves, strict=True)))).overlaps == []


# What is kept


@every_model
def test_another_strength_measures_nothing_anew(model, work):
    files = {kind: file_of(model, kind, 40 + seed) for seed, kind in enumerate(SPREAD)}
    first = look(model, put_on(model, files), "full")
    assert "_computed" in work
    work.clear()
    strengths = {"lora": (0.5, 0.1), "dora": (-1.0, 0.0), "lokr": (2.0, 1.0)}
    second = look(model, put_on(model, files, strengths), "full")
    assert work == []
    assert [row.norm for row in second.rows] == pytest.approx(
        [abs(strengths.get(row.name, (1.0,))[0]) * row.norm for row in first.rows]
    )


def test_a_short_x_ray_of_kinds_it_does_not_measure_is_not_tried_again(work):
    applied = put_on("sdxl", {kind: file_of("sdxl", kind, 60 + seed) for seed, kind in enumerate(SPREAD)})
    look("sdxl", applied)
    work.clear()
    look("sdxl", applied)
    assert work == []


@every_model
def test_the_model_stays_as_it_was(model):
    patcher, clip, _ = queueing.shared_models(model)
    applied = put_on(model, mixed(model))
    before = [hosttoys.digest(one.model.state_dict()) for one in (patcher, clip.patcher)]
    patches = [dict(one.patches) for one in (patcher, clip.patcher)]
    look(model, applied, "full")
    assert [hosttoys.digest(one.model.state_dict()) for one in (patcher, clip.patcher)] == before
    assert [one.patches for one in (patcher, clip.patcher)] == patches


def test_weights_are_measured_without_the_patches_that_lie_on_them_at_the_moment():
    """A model that just sampled with LoRAs has them in its weights until another is loaded."""
    files = {"one": {name: 3 * tensor for name, tensor in file_of("sdxl", seed=80).items()}}
    patcher = hosttoys.model("sdxl", seed=5)
    (one,) = put_on("sdxl", files)
    expected = xray.xray(patcher, None, [one]).rows[0].relative_norm
    weight_norms._kept.pop(patcher.model)
    patched = patcher.clone()
    patched.add_patches(one.patches, 1.0)
    hosttoys.loaded(patched)
    assert xray.xray(patcher, None, [one]).rows[0].relative_norm == expected


# Norms of weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("shape", [(1280, 1280), (640, 320, 3, 3), (3072, 1024), (1000, 1000), (1536,)], ids=str)
def test_the_norm_of_a_weight_is_estimated_within_2_percent(shape, dtype):
    """As real weights are: heavy tails, rows and input channels of all sizes, one of them far above the others."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(shape, generator=random) * (0.5 + torch.rand(shape, generator=random))
    if len(shape) > 1:
        weight *= torch.exp(0.3 * torch.randn(shape[0], *[1] * (len(shape) - 1), generator=random))
        weight *= torch.exp(0.3 * torch.randn(1, shape[1], *[1] * (len(shape) - 2), generator=random))
        weight[:, 7] *= 5
    weight = weight.to(dtype)
    expected = weight.double().norm().item()
    assert math.sqrt(weight_norms._estimated(weight)) == pytest.approx(expected, rel=0.02)


def test_a_part_of_the_columns_is_measured_where_it_lies():
    weight = torch.randn(1200, 900, generator=torch.Generator().manual_seed(0))
    weight[:, 600:] *= 10
    part = weight.narrow(1, 100, 500)
    assert math.sqrt(weight_norms._estimated(part)) == pytest.approx(part.norm().item(), rel=0.02)


class OnAnotherDevice(torch.Tensor):
    """A tensor on a GPU of Apple's or Intel's, as far as it matters: it has no float64, and its copy on the CPU has."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
            raise TypeError("Cannot convert a tensor to float64, as this device doesn't support it.")
        return result.as_subclass(torch.Tensor) if getattr(function, "__name__", "") == "cpu" else result


def test_devices_without_float64_can_measure_too():
    random = torch.Generator().manual_seed(0)
    up, down, other = (torch.randn(size, generator=random) for size in ((40, 3), (3, 30), (40, 30)))
    factors = changes.Factors(*(part.as_subclass(OnAnotherDevice) for part in (up, down)))
    change = up @ down
    with pytest.raises(TypeError, match="float64"):
        factors.up.double()
    found = changes.gram({"one": factors, "two": factors})
    assert found[frozenset(("one", "two"))] == pytest.approx(change.square().sum().item(), rel=1e-5)
    there = other.as_subclass(OnAnotherDevice)
    for plain in ({"one": factors}, {}):
        dense = {"one": change.as_subclass(OnAnotherDevice), "two": there}
        assert changes._inner(plain, dense, "one", "two") == pytest.approx((change * other).sum().item(), rel=1e-4)
    for size in (30, 3000):
        weight = torch.randn(40, size, generator=random)
        assert weight_norms._estimated(weight.as_subclass(OnAnotherDevice)) == weight_norms._estimated(weight)


# The report


def test_more_loras_than_are_remembered_are_all_measured(monkeypatch):
    monkeypatch.setattr(changes, "MOST_PAIRS", 4)
    applied = put_on("flux", {f"{seed}": split_file(seed) for seed in range(6)})
    for _ in range(2):
        seen = look("flux", applied)
        assert len(seen.overlaps) == 15
        assert all(row.norm and row.keys == row.keys_in_file and not row.note for row in seen.rows)


def test_blocks_count_with_their_strengths():
    files = {"one": file_of("flux")}
    whole, part = (
        put_on("flux", files, blocks=overrides(line, "blocks", 100.0))[0] for line in ("", r"single_blocks\. = 0.5")
    )
    changed = dense("flux", part)
    found = look("flux", [part]).rows[0]
    assert found.norm == pytest.approx(norm(change for _, change in changed.values()), rel=1e-4)
    assert found.norm < look("flux", [whole]).rows[0].norm


def test_layers_that_the_model_lacks_are_counted_and_named():
    tensors = file_of("sdxl", text=True)
    for name in ("a", "b", "c", "d"):
        tensors |= {f"lora_unet_{name}.lora_down.weight": torch.ones(3, 4)}
        tensors |= {f"lora_unet_{name}.lora_up.weight": torch.ones(4, 3)}
    row = look("sdxl", put_on("sdxl", {"one": tensors})).rows[0]
    assert row.keys_in_file - row.keys == 4
    assert row.note == "not applied: lora_unet_a, lora_unet_b, lora_unet_c and 1 more"
    without = look("sdxl", put_on("sdxl", {"one": tensors}, clip=False), clip=False).rows[0]
    assert without.note.startswith("1 layer of text encoders, for which no CLIP is connected; not applied: lora_unet_a")
    assert without.strength_clip is None and "clip" not in str(without).split(" (")[0]


def test_layers_of_another_size_are_counted():
    tensors = file_of("sdxl")
    layer = next(name for name in tensors if name.endswith("attn2_to_k.alpha")).removesuffix(".alpha")
    tensors[f"{layer}.lora_down.weight"] = torch.ones(3, 17)
    row = look("sdxl", put_on("sdxl", {"one": tensors})).rows[0]
    assert (row.keys, row.note) == (row.keys_in_file - 1, "1 layer of another size than this model's")


@pytest.mark.parametrize("shapes", [((0, 32), (32, 0)), ((3,), (32, 3)), ((3, 0), (32, 3)), ((3, 32), (3,))], ids=str)
def test_matrices_that_cannot_be_multiplied_are_counted_as_of_another_size(shapes):
    tensors = file_of("sdxl")
    layer = next(name for name in tensors if name.endswith("attn1_to_q.alpha")).removesuffix(".alpha")
    for side, shape in zip(("down", "up"), shapes, strict=True):
        tensors[f"{layer}.lora_{side}.weight"] = torch.ones(shape)
    (one,) = put_on("sdxl", {"one": tensors})
    for depth in ("short", "full"):
        assert look("sdxl", [one], depth).rows[0].note.startswith("1 layer of another size")


def test_values_that_are_not_finite_are_noted_and_the_table_stays_json():
    broken = file_of("sdxl")
    broken[next(name for name in broken if name.endswith("lora_up.weight"))][0, 0] = math.nan
    found = look("sdxl", put_on("sdxl", {"broken": broken, "whole": file_of("sdxl", seed=1)}))
    assert "values that are not finite" in found.rows[0].note
    json.dumps(found.table(), allow_nan=False)


@pytest.mark.parametrize(
    ("strengths", "said"),
    [
        ([1.0], ""),
        ([2.5], ""),
        ([0.8, 0.7], ""),
        ([1.0, -1.2], "The strengths add up to 2.2: keep them under 2, lowering each."),
        ([0.2] * 5, "5 LoRAs at once: 2 to 4 work best."),
    ],
)
def test_the_guidance_is_about_the_sum_and_the_number(strengths, said):
    names = {str(number): (strength, 1.0) for number, strength in enumerate(strengths)}
    found = look("sdxl", put_on("sdxl", dict.fromkeys(names, file_of("sdxl")), names))
    assert found.guidance() == found.table()["guidance"] == said
    assert found.total == pytest.approx(sum(map(abs, strengths)))


def test_a_line_says_what_matters():
    (one,) = put_on(
        "sdxl", {"people/star.safetensors": file_of("sdxl", text=True)}, {"people/star.safetensors": (0.8, 0.6)}
    )
    entries = {
        "ss_base_model_version": "sdxl_base_v1-0",
        "modelspec.trigger_phrase": "zork",
        "lora_workbench.strength": "0.9",
    }
    (row,) = look("sdxl", [Applied(*[*vars(one).values()][:5], entries, one.content)]).rows
    assert str(row) == (
        f"people/star.safetensors: SDXL LoRA rank 3, model 0.8, clip 0.6 (recommended 0.9), {row.keys} layers, "
        f"changes the weights by {100 * row.relative_norm:.2g} %, trigger words: zork"
    )
