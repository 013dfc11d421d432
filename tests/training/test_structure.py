"""Layers and blocks of a network that nobody described, told by where they are and what they are called."""

import re

from torch import nn

from lora_workbench.training.structure import structure_of


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q, self.to_out = nn.Linear(8, 8), nn.ModuleList([nn.Linear(8, 8), nn.Dropout()])


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn, self.ff = Attention(), nn.ModuleList([nn.Linear(8, 32), nn.Linear(32, 8)])
        self.adaLN_modulation_self_attn = nn.Sequential(nn.SiLU(), nn.Linear(8, 48))
        self.norm = nn.LayerNorm(8)


class Network(nn.Module):
    def __init__(self, depth=12):
        super().__init__()
        self.img_in, self.final = nn.Linear(4, 8), nn.Linear(8, 4)
        self.refiner = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
        self.transformer = nn.Module()
        self.transformer.blocks = nn.ModuleList([Block() for _ in range(depth)])


def names(network, pattern):
    return [name for name, _ in network.named_modules() if re.search(pattern, name)]


def test_presets_grow_from_attention_to_all_linear_layers_of_the_repeated_blocks():
    network, structure = Network(), structure_of(Network())
    in_block = "transformer.blocks.11."
    attention = [f"{in_block}attn.to_q", f"{in_block}attn.to_out.0"]
    feed_forward = [f"{in_block}ff.0", f"{in_block}ff.1"]
    modulation = [f"{in_block}adaLN_modulation_self_attn.1"]
    assert names(network, structure.attention)[-2:] == attention
    assert names(network, structure.attention_and_feed_forward)[-4:] == attention + feed_forward
    assert names(network, structure.full)[-5:] == attention + feed_forward + modulation
    assert [len(names(network, p)) for p in (structure.attention, structure.full)] == [12 * 2, 12 * 5]
    assert structure.blocks == ("Block",)


def test_a_pattern_fits_a_deeper_network_of_the_same_make_and_no_more():
    structure = structure_of(Network(2))
    assert re.search(structure.full, "transformer.blocks.59.ff.1")
    assert not re.search(structure.full, "transformer.blocks.59.ff.1.more")
    assert not re.search(structure.full, "transformer_blocks_59.ff.1")


def test_lists_without_attention_are_no_blocks_and_a_network_without_blocks_has_no_structure():
    assert structure_of(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))) is None
    assert structure_of(Network(0)) is None


def test_a_wider_network_keeps_more():
    assert structure_of(Network(24)).activations_gib == 2 * structure_of(Network(12)).activations_gib > 0
