"""Layers of a file: every form of key and every kind, against what ComfyUI's loader makes of the same tensors."""

import comfy.lora
import pytest
import torch

from lora_workbench.lora_files.layers import DIFFERENCE, UNKNOWN, layers_of
from lora_workbench.training.config import DORA, LOHA, LOKR, LORA, OFT

pytestmark = pytest.mark.comfy
LINEAR, CONVOLUTION = (12, 8), (12, 8, 3, 3)
FORMS = {
    "kohya": ("x.lora_up.weight", "x.lora_down.weight"),
    "peft": ("x.lora_B.weight", "x.lora_A.weight"),
    "peft with its adapter's name": ("x.lora_B.default.weight", "x.lora_A.default.weight"),
    "diffusers of old": ("x_lora.up.weight", "x_lora.down.weight"),
    "diffusers": ("x.lora.up.weight", "x.lora.down.weight"),
    "transformers": ("x.lora_linear_layer.up.weight", "x.lora_linear_layer.down.weight"),
    "mochi": ("x.lora_B", "x.lora_A"),
}


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def kron(first, second):
    return {"lokr_w1": drawn(*first), "lokr_w2": drawn(*second)}


KINDS = {
    "lora": (LORA, LINEAR, {"lora_up.weight": drawn(12, 3), "lora_down.weight": drawn(3, 8)}),
    "convolution": (
        LORA,
        CONVOLUTION,
        {"lora_up.weight": drawn(12, 3, 1, 1), "lora_down.weight": drawn(3, 8, 3, 3)},
    ),
    "convolution with a core": (
        LORA,
        CONVOLUTION,
        {
            "lora_up.weight": drawn(12, 3, 1, 1),
            "lora_down.weight": drawn(3, 8, 1, 1),
            "lora_mid.weight": drawn(3, 3, 3, 3),
        },
    ),
    "loha": (
        LOHA,
        LINEAR,
        {"hada_w1_a": drawn(12, 3), "hada_w1_b": drawn(3, 8), "hada_w2_a": drawn(12, 2), "hada_w2_b": drawn(2, 8)},
    ),
    "loha with cores": (
        LOHA,
        CONVOLUTION,
        {
            "hada_t1": drawn(3, 3, 3, 3),
            "hada_w1_a": drawn(3, 12),
            "hada_w1_b": drawn(3, 8),
            "hada_t2": drawn(3, 3, 3, 3, seed=1),
            "hada_w2_a": drawn(3, 12, seed=1),
            "hada_w2_b": drawn(3, 8, seed=1),
        },
    ),
    "lokr": (LOKR, LINEAR, {"lokr_w1": drawn(3, 2), "lokr_w2_a": drawn(4, 2), "lokr_w2_b": drawn(2, 4)}),
    "lokr of two products": (
        LOKR,
        LINEAR,
        {"lokr_w1_a": drawn(3, 1), "lokr_w1_b": drawn(1, 2), "lokr_w2_a": drawn(4, 3), "lokr_w2_b": drawn(3, 4)},
    ),
    "lokr in full": (LOKR, LINEAR, kron((3, 2), (4, 4))),
    "lokr of a convolution": (LOKR, CONVOLUTION, kron((3, 2), (4, 4, 3, 3))),
    "difference": (DIFFERENCE, LINEAR, {"diff": drawn(12, 8)}),
}


def loaders_change(tensors, shape):
    """What ComfyUI adds to a weight of zeros."""
    patches = comfy.lora.load_lora(tensors, {"x": "x.weight"})
    return comfy.lora.calculate_weight([(1.0, patches["x.weight"], 1.0, None, None)], torch.zeros(shape), "x.weight")


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_the_change_is_the_loaders(name, alpha):
    kind, shape, parts = KINDS[name]
    if alpha is not None:
        parts = parts | {"alpha": torch.tensor(alpha)}
    tensors = {f"x.{part}": tensor for part, tensor in parts.items()}
    layer = layers_of(tensors)["x"]
    expected = loaders_change(tensors, shape)
    assert (layer.name, layer.kind) == ("x", kind) and expected.norm() > 1
    torch.testing.assert_close(layer.change(), expected.flatten(1), rtol=1e-5, atol=1e-5)
    assert layer.norm() == pytest.approx(expected.norm().item(), rel=1e-5)
    factors = layer.factors()
    assert (factors is not None) == (kind == LORA)
    if factors:
        torch.testing.assert_close(factors.up @ factors.down, expected.flatten(1), rtol=1e-5, atol=1e-5)


def test_a_lokr_with_a_core_is_multiplied_out():
    """ComfyUI's loader fails on these on the CPU, so the formula of LyCORIS is the reference."""
    first, core, a, b = drawn(3, 2), drawn(2, 2, 3, 3), drawn(2, 4), drawn(2, 4, seed=1)
    layer = layers_of({"x.lokr_w1": first, "x.lokr_t2": core, "x.lokr_w2_a": a, "x.lokr_w2_b": b})["x"]
    second = sum(core[i, j][None, None] * torch.outer(a[i], b[j])[:, :, None, None] for i in range(2) for j in range(2))
    expected = torch.stack([torch.cat([second * c for c in row], 1) for row in first]).flatten(0, 1).flatten(1)
    torch.testing.assert_close(layer.change(), expected)


@pytest.mark.parametrize("form", FORMS)
def test_the_matrices_are_found_in_every_form_that_the_loader_reads(form):
    up, down = drawn(12, 3), drawn(3, 8)
    tensors = dict(zip(FORMS[form], (up, down), strict=True)) | {"x.alpha": torch.tensor(6.0, dtype=torch.float16)}
    layer = layers_of(tensors)["x"]
    assert (layer.kind, layer.rank, layer.scale) == (LORA, 3, 2.0)
    assert set(layer.parts) == {"lora_up.weight", "lora_down.weight", "alpha"}
    torch.testing.assert_close(layer.change(), loaders_change(tensors, LINEAR), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16, torch.float16])
def test_stored_types_are_read_as_what_they_say(dtype):
    up, down = drawn(12, 3).to(dtype), drawn(3, 8).to(dtype)
    layer = layers_of({"x.lora_up.weight": up, "x.lora_down.weight": down})["x"]
    torch.testing.assert_close(layer.change(), up.float() @ down.float())


def test_kinds_that_depend_on_the_weight_have_no_change_of_their_own():
    plain = {"x.lora_up.weight": drawn(12, 3), "x.lora_down.weight": drawn(3, 8)}
    for tensors, kind in (
        (plain | {"x.dora_scale": drawn(12, 1)}, DORA),
        ({"x.lora_A.weight": drawn(3, 8), "x.lora_B.weight": drawn(12, 3), "x.lora_magnitude_vector": drawn(12)}, DORA),
        ({"x.oft_blocks": drawn(3, 4, 4), "x.alpha": torch.tensor(1e-3)}, OFT),
    ):
        layer = layers_of(tensors)["x"]
        assert (layer.kind, layer.factors(), layer.change(), layer.norm()) == (kind, None, None, None)


@pytest.mark.parametrize(
    "tensors",
    [
        {"x.lora_up.weight": drawn(12, 3)},
        {"x.lora_up.weight": drawn(12, 3), "x.lora_down.weight": drawn(4, 8)},
        {"x.lora_up.weight": drawn(12), "x.lora_down.weight": drawn(12)},
        {"x.hada_w1_a": drawn(12, 3), "x.hada_w1_b": drawn(3, 8)},
        {"x.lokr_w2": drawn(4, 4)},
        {"x.a1.weight": drawn(4, 4), "x.a2.weight": drawn(4, 4)},
        {"x.set_weight": drawn(12, 8)},
        {"x": drawn(12)},
    ],
    ids=lambda tensors: ", ".join(tensors),
)
def test_what_is_incomplete_or_unheard_of_is_unknown(tensors):
    layer = layers_of(tensors)["x"]
    assert (layer.kind, layer.factors(), layer.change(), layer.norm()) == (UNKNOWN, None, None, None)


def test_an_alpha_of_several_numbers_is_named():
    tensors = {"x.lora_up.weight": drawn(12, 3), "x.lora_down.weight": drawn(3, 8), "x.alpha": torch.ones(2)}
    with pytest.raises(ValueError, match="The alpha of layer 'x' is no single number"):
        layers_of(tensors)["x"].change()


def test_layers_keep_their_order_and_bundled_embeddings_are_none():
    tensors = {
        "b.lora_down.weight": drawn(3, 8),
        "bundle_emb.zork.clip_l": drawn(2, 8),
        "a.lora_down.weight": drawn(3, 8),
        "b.lora_up.weight": drawn(12, 3),
    }
    assert list(layers_of(tensors)) == ["b", "a"]
