"""Resizing: the share that is said to be kept is that of the dense change, and nothing else is touched."""

import math

import pytest
import torch

from lora_workbench.lora_files.layers import layers_of
from lora_workbench.lora_files.low_rank import of_layer
from lora_workbench.lora_files.resizing import resized

OUT, IN = 40, 24


def matrices(name, rank, seed, sizes=None, convolution=False):
    """A LoRA whose singular values are `sizes`, or fall by a quarter each."""
    made = torch.Generator().manual_seed(seed)
    width = IN * 9 if convolution else IN
    left = torch.linalg.qr(torch.randn(OUT, rank, generator=made)).Q
    right = torch.linalg.qr(torch.randn(width, rank, generator=made)).Q
    sizes = torch.tensor(sizes) if sizes else 3 * 0.75 ** torch.arange(rank)
    up, down = left * sizes, right.t()
    if convolution:
        up, down = up[:, :, None, None], down.view(rank, IN, 3, 3)
    return {f"{name}.lora_up.weight": up.contiguous(), f"{name}.lora_down.weight": down.contiguous()}


def plain():
    tensors = matrices("a", 12, 0) | matrices("c", 8, 1, convolution=True) | matrices("b", 4, 2)
    return tensors | {"a.alpha": torch.tensor(6.0), "c.alpha": torch.tensor(8.0)}


def changes(tensors):
    return {name: layer.change() for name, layer in layers_of(tensors).items()}


def dense_share(before, after):
    """|change kept| / |change| from the dense matrices, and how far what is kept is from what was."""
    norms = [math.hypot(*(change.norm().item() for change in changes(tensors).values())) for tensors in (before, after)]
    apart = math.hypot(*((changes(after)[name] - change).norm().item() for name, change in changes(before).items()))
    return norms[1] / norms[0], apart / norms[0]


@pytest.mark.parametrize("wanted", [{"rank": 3}, {"rank": 6}, {"energy": 0.8}, {"energy": 0.99}, {"ratio": 0.3}])
def test_the_share_kept_is_that_of_the_dense_change(wanted):
    result = resized(plain(), **wanted)
    share, apart = dense_share(plain(), result.tensors)
    assert result.kept == pytest.approx(share, abs=1e-6) and share < 1 - 1e-4
    # What the nearest change of lower rank lacks stands at right angles to what it keeps.
    assert share**2 + apart**2 == pytest.approx(1.0, abs=1e-5)
    assert result.ranks == {name: layer.rank for name, layer in layers_of(result.tensors).items()}
    assert sum(map(torch.Tensor.numel, result.tensors.values())) < sum(map(torch.Tensor.numel, plain().values()))


def test_energy_takes_the_fewest_parts_that_suffice_and_ratio_all_that_are_large_enough():
    sizes = [4.0, 3.0, 2.0, 1.0]  # squares: 16, 25, 29, 30 of 30
    tensors = matrices("a", 4, 0, sizes)
    for energy, rank in ((0.5, 1), (0.54, 2), (0.83, 2), (0.84, 3), (0.97, 4), (1.0, 4)):
        assert resized(tensors, energy=energy).ranks == {"a": rank}, energy
    for ratio, rank in ((0.0, 4), (0.24, 4), (0.26, 3), (0.51, 2), (1.0, 1)):
        assert resized(tensors, ratio=ratio).ranks == {"a": rank}, ratio


def test_a_rank_that_is_high_enough_leaves_every_bit():
    result = resized(plain(), rank=12)
    assert result.kept == 1.0 and result.tensors.keys() == plain().keys()
    assert all(torch.equal(tensor, plain()[name]) for name, tensor in result.tensors.items())
    part = resized(plain(), rank=8)
    assert part.ranks == {"a": 8, "b": 4, "c": 8}
    assert torch.equal(part.tensors["c.lora_up.weight"], plain()["c.lora_up.weight"])
    assert part.tensors["a.alpha"] == 8 and part.kept < 1


def test_names_and_forms_stay():
    made = matrices("a", 6, 0)
    peft = {"t.lora_B.weight": made["a.lora_up.weight"], "t.lora_A.weight": made["a.lora_down.weight"]}
    result = resized(peft, rank=2)
    assert {name: tuple(tensor.shape) for name, tensor in result.tensors.items()} == {
        "t.lora_B.weight": (OUT, 2),
        "t.lora_A.weight": (2, IN),
    }
    assert layers_of(result.tensors)["t"].norm() == pytest.approx(layers_of(peft)["t"].norm() * result.kept)
    convolution = resized(matrices("c", 8, 1, convolution=True), rank=2).tensors
    assert convolution["c.lora_down.weight"].shape == (2, IN, 3, 3)
    assert convolution["c.lora_up.weight"].shape == (OUT, 2, 1, 1)


def drawn(**shapes):
    made = torch.Generator().manual_seed(4)
    return {f"x.{name}": torch.randn(shape, generator=made) for name, shape in shapes.items()}


LYCORIS = {
    "loha": drawn(hada_w1_a=(OUT, 3), hada_w1_b=(3, IN), hada_w2_a=(OUT, 2), hada_w2_b=(2, IN)),
    "loha of many pairs": drawn(hada_w1_a=(OUT, 30), hada_w1_b=(30, IN), hada_w2_a=(OUT, 20), hada_w2_b=(20, IN)),
    "lokr": drawn(lokr_w1=(4, 4), lokr_w2_a=(10, 2), lokr_w2_b=(2, 6)) | {"x.alpha": torch.tensor(-3.0)},
    "lokr of a convolution": drawn(lokr_w1=(4, 4), lokr_w2=(10, 6, 3, 3)),
}


@pytest.mark.parametrize("kind", LYCORIS)
def test_loha_and_lokr_are_taken_apart_exactly(kind):
    layer = layers_of(LYCORIS[kind])["x"]
    spectrum, dense = of_layer(layer), layer.change()
    reference = torch.linalg.svdvals(dense.double())
    torch.testing.assert_close(spectrum.sizes, reference[: len(spectrum.sizes)], rtol=1e-5, atol=1e-4)
    assert spectrum.whole == pytest.approx(dense.square().sum().item(), rel=1e-5)
    everything = spectrum.first(len(spectrum.sizes))
    torch.testing.assert_close(everything.up @ everything.down, dense, rtol=1e-4, atol=1e-4)
    result = resized(LYCORIS[kind], rank=2)
    assert result.kept == pytest.approx((reference[:2].norm() / reference.norm()).item(), rel=1e-5)
    assert layers_of(result.tensors)["x"].rank == 2 and any("LoHa and LoKr" in note for note in result.notes)
    assert layers_of(result.tensors)["x"].norm() == pytest.approx(reference[:2].norm().item(), rel=1e-5)


def test_a_dora_keeps_its_magnitudes_and_other_kinds_stay():
    magnitude = torch.rand(OUT, 1)
    tensors = matrices("a", 6, 0) | {"a.dora_scale": magnitude, "a.alpha": torch.tensor(3.0)}
    other = {"n.diff": torch.ones(OUT), "o.oft_blocks": torch.ones(2, 3, 3), "bundle_emb.zork.clip_l": torch.ones(1, 8)}
    result = resized(tensors | other, rank=2)
    assert result.tensors["a.lora_up.weight"].shape == (OUT, 2) and result.tensors["a.alpha"] == 2
    for name, tensor in (other | {"a.dora_scale": magnitude}).items():
        assert result.tensors[name] is tensor or torch.equal(result.tensors[name], tensor)
    assert result.notes == [
        "Its DoRA magnitudes stay as they are; what is kept is said of its matrices.",
        "2 of 3 layers are of another kind and stay as they are.",
    ]


def test_a_layer_of_nothing_is_kept_as_nothing_and_a_file_without_ranks_is_refused():
    nothing = {"z.lora_up.weight": torch.zeros(OUT, 3), "z.lora_down.weight": torch.ones(3, IN)}
    result = resized(nothing | matrices("a", 3, 0), rank=1)
    assert "z.lora_up.weight" not in result.tensors and result.ranks == {"z": 0, "a": 1}
    with pytest.raises(ValueError, match="This file has no LoRA, LoHa or LoKr layer"):
        resized({"o.oft_blocks": torch.ones(2, 3, 3)}, rank=1)
