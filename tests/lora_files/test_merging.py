"""Merging: side by side is exact; what is cut says how much is left; the rest is a sentence."""

import math

import pytest
import torch

from lora_workbench.lora_files.layers import layers_of
from lora_workbench.lora_files.merging import CONCATENATE, DARE, METHODS, SVD, TIES, Source, merged
from lora_workbench.lora_files.sparse import ties

OUT, IN = 24, 16
UNET, TEXT, CONVOLUTION = "lora_unet_a", "lora_te1_b", "lora_unet_c"


def random(seed):
    return torch.Generator().manual_seed(seed)


def lora(seed, rank=3, alpha=1.5, names=(UNET, TEXT), convolution=False):
    made = random(seed)
    tensors = {}
    for name in names:
        tensors[f"{name}.lora_up.weight"] = torch.randn(OUT, rank, generator=made)
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, IN, generator=made)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    if convolution:
        tensors[f"{CONVOLUTION}.lora_up.weight"] = torch.randn(OUT, rank, 1, 1, generator=made)
        tensors[f"{CONVOLUTION}.lora_down.weight"] = torch.randn(rank, IN, 3, 3, generator=made)
    return tensors


def changes(tensors):
    """What a file changes about weights; a layer that only has a bias changes none."""
    return {name: change for name, layer in layers_of(tensors).items() if (change := layer.change()) is not None}


def total(sources):
    """What the files change together, layer by layer."""
    sums = {}
    for source in sources:
        for name, change in changes(source.tensors).items():
            weight = source.text if name == TEXT else source.model
            sums[name] = sums.get(name, 0) + weight * change
    return sums


SOURCES = [
    Source("one", lora(0, rank=3, convolution=True), 0.8, 0.3),
    Source("two", lora(1, rank=5, alpha=None), -0.5, 1.2),
    Source("three", lora(2, rank=2, alpha=4.0, names=(UNET,), convolution=True), 1.0, 0.0),
]


def test_side_by_side_is_the_sum_exactly():
    result = merged(SOURCES, CONCATENATE)
    expected, got = total(SOURCES), changes(result.tensors)
    assert got.keys() == expected.keys() and result.kept == 1.0 and result.notes == []
    for name, change in expected.items():
        torch.testing.assert_close(got[name], change, rtol=1e-5, atol=1e-5)
    ranks = {name: layer.rank for name, layer in layers_of(result.tensors).items()}
    assert ranks == {UNET: 10, TEXT: 8, CONVOLUTION: 5}
    assert result.tensors[f"{CONVOLUTION}.lora_down.weight"].shape == (5, IN, 3, 3)
    assert result.tensors[f"{CONVOLUTION}.lora_up.weight"].shape == (OUT, 5, 1, 1)


@pytest.mark.parametrize("method", METHODS)
def test_each_layer_is_stored_before_the_next_is_made(method):
    """So that a large merge is never there in float32 as a whole."""
    order = []

    def store(key, tensor):
        order.append(key)
        return tensor.half()

    stored = merged(SOURCES, method, watch=lambda done, total: order.append(done), store=store)
    whole = merged(SOURCES, method)
    assert stored.tensors.keys() == whole.tensors.keys() == {key for key in order if isinstance(key, str)}
    assert all(torch.equal(stored.tensors[key], tensor.half()) for key, tensor in whole.tensors.items())
    assert [place for place, key in enumerate(order) if isinstance(key, int)] == [3, 7, 11]


def test_files_of_one_scale_keep_every_bit_side_by_side():
    """So 16-bit files merged at equal weights lose nothing where they are written in 16 bits again."""
    halves = [{name: tensor.half() for name, tensor in lora(seed).items()} for seed in (0, 1)]
    result = merged([Source("one", halves[0], 0.7, 0.7), Source("two", halves[1], 0.7, 0.7)], CONCATENATE)
    up = result.tensors[f"{UNET}.lora_up.weight"]
    assert torch.equal(up, torch.cat([half[f"{UNET}.lora_up.weight"].float() for half in halves], 1))
    assert layers_of(result.tensors)[UNET].scale == pytest.approx(0.7 * 0.5)


def test_svd_at_the_full_rank_is_exact_and_a_lower_rank_keeps_the_share_it_says():
    expected = total(SOURCES)
    whole = merged(SOURCES, SVD, rank=10)
    assert whole.kept == pytest.approx(1.0, abs=1e-9)
    for name, change in changes(whole.tensors).items():
        torch.testing.assert_close(change, expected[name], rtol=1e-5, atol=1e-5)
    cut = merged(SOURCES, SVD, rank=2)
    best = {name: torch.linalg.svdvals(change)[:2].norm() for name, change in expected.items()}
    norms = {name: change.norm() for name, change in expected.items()}
    share = math.hypot(*best.values()) / math.hypot(*norms.values())
    assert cut.kept == pytest.approx(share, rel=1e-5) and share < 0.9
    assert {layer.rank for layer in layers_of(cut.tensors).values()} == {2}
    for name, change in changes(cut.tensors).items():
        assert change.norm().item() == pytest.approx(best[name].item(), rel=1e-5)


def test_without_a_rank_each_layer_has_the_highest_of_the_files():
    ranks = {name: layer.rank for name, layer in layers_of(merged(SOURCES, SVD).tensors).items()}
    assert ranks == {UNET: 5, TEXT: 5, CONVOLUTION: 3}


# TIES and DARE


def test_a_merge_by_ties_is_that_of_the_weighted_changes():
    result = merged(SOURCES, TIES, rank=IN * 9, density=0.4)
    for name in (UNET, TEXT, CONVOLUTION):
        weighted = [
            (source.text if name == TEXT else source.model) * changes(source.tensors)[name]
            for source in SOURCES
            if name in changes(source.tensors)
        ]
        got = changes(result.tensors)[name]
        torch.testing.assert_close(got, ties(weighted, 0.4), rtol=1e-4, atol=1e-4)
    assert result.kept == pytest.approx(1.0, abs=1e-6)


def test_a_merge_by_dare_is_the_sum_of_what_is_left_of_each():
    alone = [merged([source], DARE, rank=IN * 9, density=0.5, seed=7) for source in SOURCES[:1]]
    both = merged(SOURCES[:2], DARE, rank=IN * 9, density=0.5, seed=7)
    first, sums = changes(alone[0].tensors)[UNET], changes(both.tensors)[UNET]
    other = (sums - first) / (-0.5)
    stays = other.abs() > 1e-3
    torch.testing.assert_close(other[stays], (changes(SOURCES[1].tensors)[UNET] / 0.5)[stays], rtol=1e-3, atol=1e-3)
    assert 0.3 < stays.float().mean() < 0.7
    assert both.kept == pytest.approx(1.0, abs=1e-6)


def test_the_seed_decides_what_dare_drops_in_every_layer_and_file():
    def dropped(seed):
        return merged(SOURCES, DARE, rank=4, density=0.5, seed=seed).tensors

    again, other = dropped(1), dropped(2)
    assert all(torch.equal(tensor, again[name]) for name, tensor in dropped(1).items())
    assert not torch.equal(again[f"{UNET}.lora_up.weight"], other[f"{UNET}.lora_up.weight"])


def test_all_densities_of_1_are_the_plain_sum():
    for name, change in changes(merged(SOURCES, DARE, rank=IN * 9, density=1.0).tensors).items():
        torch.testing.assert_close(change, total(SOURCES)[name], rtol=1e-4, atol=1e-4)


# Other kinds


def loha():
    made = random(8)
    parts = {"hada_w1_a": (OUT, 2), "hada_w1_b": (2, IN), "hada_w2_a": (OUT, 2), "hada_w2_b": (2, IN)}
    return {f"{UNET}.{part}": torch.randn(shape, generator=made) for part, shape in parts.items()}


def lokr():
    made = random(9)
    parts = {"lokr_w1": (4, 4), "lokr_w2": (OUT // 4, IN // 4)}
    return {f"{UNET}.{part}": torch.randn(shape, generator=made) for part, shape in parts.items()}


@pytest.mark.parametrize("method", [SVD, TIES, DARE])
@pytest.mark.parametrize("other", [loha(), lokr()], ids=["loha", "lokr"])
def test_loha_and_lokr_are_multiplied_out(method, other):
    sources = [Source("one", lora(0)), Source("lycoris", other, 0.5, 0.5)]
    result = merged(sources, method, rank=IN, density=1.0)
    if method != TIES:
        torch.testing.assert_close(changes(result.tensors)[UNET], total(sources)[UNET], rtol=1e-4, atol=1e-4)
    assert changes(result.tensors)[UNET].norm() > 1
    assert any("lycoris" in note and "multiplied out" in note for note in result.notes)


@pytest.mark.parametrize("other, called", [(loha(), "LoHa"), (lokr(), "LoKr")])
def test_side_by_side_refuses_what_has_no_two_matrices(other, called):
    with pytest.raises(ValueError, match=f"'lycoris' is a {called}, which has no matrices .* set method to svd"):
        merged([Source("one", lora(0)), Source("lycoris", other)], CONCATENATE)


ATTENTION = "input_blocks.4.1.transformer_blocks.0.attn1.to_q"


def test_one_layer_without_a_name_does_not_keep_the_others_apart():
    """Two names of one weight in a file would hide one another in the loader."""
    kohyas = lora(0, names=(f"lora_unet_{ATTENTION.replace('.', '_')}", "lora_unet_odd"))
    theirs = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    comfyuis, diffusers = lora(1, names=(f"diffusion_model.{ATTENTION}",)), lora(2, names=(theirs,))
    result = merged([Source("a", kohyas), Source("b", comfyuis), Source("c", diffusers)], CONCATENATE)
    ranks = {name: layer.rank for name, layer in layers_of(result.tensors).items()}
    assert ranks == {f"lora_unet_{ATTENTION.replace('.', '_')}": 9, "lora_unet_odd": 3}


@pytest.mark.parametrize("method", METHODS)
def test_what_depends_on_the_model_is_refused(method):
    dora = lora(0) | {f"{UNET}.dora_scale": torch.ones(OUT, 1)}
    oft = {f"{UNET}.oft_blocks": torch.zeros(4, 6, 6)}
    for tensors, kind in ((dora, "DoRA"), (oft, "OFT")):
        with pytest.raises(
            ValueError, match=f"'other' is a LoRA of the kind {kind}, whose change depends on the model"
        ):
            merged([Source("one", lora(1)), Source("other", tensors)], method)


def test_what_nobody_knows_is_refused_by_name():
    for strange in ({f"{UNET}.set_weight": torch.ones(OUT, IN)}, lora(0) | {f"{UNET}.reshape_weight": torch.ones(2)}):
        with pytest.raises(ValueError, match=f"Layer '{UNET}' of 'other' is of a kind that cannot be merged"):
            merged([Source("one", lora(1)), Source("other", strange)], SVD)


def test_layers_of_different_sizes_are_of_different_models():
    wide = {f"{UNET}.lora_up.weight": torch.ones(OUT, 2), f"{UNET}.lora_down.weight": torch.ones(2, IN + 1)}
    with pytest.raises(ValueError, match=f"'one' and 'wide' change layers '{UNET}' of different sizes"):
        merged([Source("one", lora(1)), Source("wide", wide)], CONCATENATE)


@pytest.mark.parametrize("method", METHODS)
def test_differences_and_biases_are_added_up(method):
    whole = {f"{UNET}.diff": torch.ones(OUT, IN), f"{TEXT}.diff_b": torch.ones(OUT)}
    bias = lora(1) | {f"{TEXT}.diff_b": 2 * torch.ones(OUT)}
    sources = [Source("whole", whole, 0.5, 0.25), Source("lora", bias, 2.0, 1.0)]
    result = merged(sources, method, rank=IN, density=1.0)
    torch.testing.assert_close(result.tensors[f"{UNET}.diff"], total(sources)[UNET], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.tensors[f"{TEXT}.diff_b"], torch.full((OUT,), 2.25))
    assert not any(name.startswith(f"{UNET}.lora") for name in result.tensors)
    assert any("changed in full" in note for note in result.notes)


def test_embeddings_come_along_unless_two_files_call_others_the_same():
    words = [{f"bundle_emb.{name}.clip_l": torch.full((1, 8), value)} for name, value in (("zork", 1.0), ("blip", 2.0))]
    both = merged([Source("one", lora(0) | words[0]), Source("two", lora(1) | words[1])], CONCATENATE)
    assert {name for name in both.tensors if name.startswith("bundle_emb")} == words[0].keys() | words[1].keys()
    other = {name: tensor + 1 for name, tensor in words[0].items()}
    result = merged([Source("one", lora(0) | words[0]), Source("two", lora(1) | other)], CONCATENATE)
    assert torch.equal(result.tensors["bundle_emb.zork.clip_l"], words[0]["bundle_emb.zork.clip_l"])
    assert result.notes == ["two: its embeddings are called as those of another file and were left out."]


def test_a_weight_of_0_leaves_a_file_out_and_nothing_at_all_is_an_error():
    result = merged([Source("one", lora(0)), Source("none", {"x.set_weight": torch.ones(1)}, 0.0, 0.0)], CONCATENATE)
    assert changes(result.tensors).keys() == {UNET, TEXT}
    with pytest.raises(ValueError, match="Nothing is left of these LoRAs"):
        merged([Source("one", lora(0), 0.0, 0.0)], CONCATENATE)
