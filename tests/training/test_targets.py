"""Which layers are adapted, with which rank, and what is said about patterns that cannot be read."""

import pytest
import torch
from torch import nn
from toys import Network, part

from lora_workbench.training.config import LoraConfig, TrainConfig
from lora_workbench.training.families import LAYER_PRESETS
from lora_workbench.training.lora import Adapter, Adapters, Part
from lora_workbench.training.patterns import last_match, overrides, patterns
from lora_workbench.training.targets import UNET, targets, without_effect


class Convolutional(nn.Module):
    """What a UNet has: a convolution at either end, blocks with 3 x 3 and 1 x 1 convolutions, attention."""

    def __init__(self):
        super().__init__()
        self.into = nn.Conv2d(4, 8, 3)
        self.block = nn.ModuleDict(
            {
                "in_layers": nn.Conv2d(8, 8, 3),
                "skip": nn.Conv2d(8, 8, 1),
                "proj_in": nn.Conv2d(8, 8, 1),
                "grouped": nn.Conv2d(8, 8, 3, groups=8),
                "to_q": nn.Linear(8, 8),
                "to_k": nn.Linear(8, 8),
                "norm": nn.LayerNorm(8),
            }
        )
        self.out = nn.Conv2d(8, 4, 3)


def chosen(pattern="to_", **config):
    """Name of each adapted layer -> its rank."""
    layers = dict.fromkeys(LAYER_PRESETS, pattern)
    found = targets(Convolutional(), "lora_unet_", layers, LoraConfig(**{"rank": 4, **config}))
    return {target.name.removeprefix("block."): target.rank for target in found}


def test_a_preset_names_linear_layers_and_small_convolutions():
    assert chosen() == {"to_q": 4, "to_k": 4}
    assert chosen("to_|proj_in") == {"proj_in": 4, "to_q": 4, "to_k": 4}
    assert "in_layers" not in chosen("")


def test_conv_rank_adapts_larger_convolutions_but_not_those_that_read_and_write_latents():
    assert chosen(conv_rank=2) == {"in_layers": 2, "to_q": 4, "to_k": 4}


def test_include_adds_layers_a_line_each():
    assert chosen(include="skip\n ^into ") == {"into": 4, "skip": 4, "to_q": 4, "to_k": 4}
    assert chosen(include="in_layers", conv_rank=2)["in_layers"] == 2
    assert chosen(include="in_layers")["in_layers"] == 4


def test_a_grouped_convolution_is_never_adapted():
    assert "grouped" not in chosen("", include="grouped", conv_rank=2)


def test_exclude_takes_layers_away_that_anything_else_added():
    assert chosen(include="skip", exclude="skip\nto_k") == {"to_q": 4}


def test_ranks_override_and_the_last_line_that_matches_wins():
    assert chosen(ranks="to_ = 8\nto_k = 2") == {"to_q": 8, "to_k": 2}
    assert chosen(ranks="to_k=2\nto_ = 8") == {"to_q": 8, "to_k": 8}


def test_rank_zero_leaves_a_layer_alone():
    assert chosen(ranks="to_k = 0") == {"to_q": 4}


def test_ranks_alone_add_no_layer():
    assert "skip" not in chosen(ranks="skip = 4")


def test_patterns_are_looked_for_in_the_name_of_the_file_too():
    assert chosen(exclude="^lora_unet_block_to_q$") == {"to_k": 4}
    assert chosen(exclude="^lora_te1_") == {"to_q": 4, "to_k": 4}


def test_a_pattern_may_hold_an_equals_sign():
    assert chosen(ranks="(?=to_k) = 2") == {"to_q": 4, "to_k": 2}


def test_every_layer_goes_by_kohyas_name():
    (target,) = targets(Convolutional(), "lora_te1_", dict.fromkeys(LAYER_PRESETS, "to_q"), LoraConfig())
    assert target.key == "lora_te1_block_to_q"


@pytest.mark.parametrize(
    ("setting", "line"),
    [("include", "(["), ("exclude", "*a"), ("ranks", "([ = 2")],
    ids=["include", "exclude", "ranks"],
)
def test_a_pattern_that_is_none_is_one_sentence_with_the_setting_and_the_pattern(setting, line):
    with pytest.raises(ValueError, match=f"^{setting} has the pattern ") as error:
        chosen(**{setting: f"to_q{' = 4' if setting == 'ranks' else ''}\n{line}"})
    assert line.removesuffix(" = 2") in str(error.value) and str(error.value).endswith(".")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("line", ["to_q", "= 4", "to_q = ", "to_q = four", "to_q = 2.5", "to_q = -1", "to_q = 2000"])
def test_a_rank_that_is_none_is_one_sentence_with_the_line(line):
    with pytest.raises(ValueError, match=r"^ranks has the line '.*whole number between 0 and 1024.*\.$") as error:
        chosen(ranks=f"to_k = 4\n{line}")
    assert f"'{line.strip()}'" in str(error.value)


def test_numbers_that_need_not_be_whole_may_be_fractions():
    pairs = overrides("a = 0.5\n\nab = 2", "rates", 1000)
    assert [last_match(pairs, name) for name in ("a", "ab", "c")] == [0.5, 2.0, None]
    with pytest.raises(ValueError, match="a number between 0 and 1000"):
        overrides("a = much", "rates", 1000)
    assert patterns("\n a \n", "include")[0].pattern == "a"


def test_a_preset_that_a_network_lacks_is_one_sentence():
    with pytest.raises(ValueError, match="^Unknown layers 'attention': choose one of 'other'\\.$"):
        targets(Convolutional(), "lora_unet_", {"other": ""}, LoraConfig(layers="attention"))


# Several networks


def two_parts():
    first, second = Network(seed=0), Network(seed=1)
    layers = part(second).layers
    return [part(first), Part("lora_te1_", second, layers, rate=0.5, until=0.25)]


def test_adapters_of_several_networks_are_told_apart_by_their_prefix():
    parts = two_parts()
    adapters = Adapters.build(parts, LoraConfig(rank=2), seed=0)
    for one in parts:
        own = adapters.of(one.prefix)
        assert len(own) == 6 and all(adapter.layer is one.network.get_submodule(adapter.name) for adapter in own)
    assert len(adapters) == 12


def segments(config="", parts=None, lora_plus=1.0, **lora):
    adapters = Adapters.build(parts or [part(Network())], LoraConfig(**{"rank": 2, **lora}), seed=0)
    return adapters, adapters.segments(TrainConfig(rates=config, lora_plus=lora_plus))


def rates_of(adapters, found):
    """(layer, tensor) -> the rate and the end of the segment that holds it."""
    rates = {}
    for adapter in adapters:
        for name, tensor in adapter.tensors.items():
            (segment,) = [one for one in found if covers(one.values, tensor)]
            rates[adapter.key, name] = (segment.rate, segment.until)
    return rates


def covers(values, tensor):
    start = values.data_ptr()
    return start <= tensor.data_ptr() < start + values.nbytes


def test_with_one_rate_the_whole_memory_is_one_segment():
    adapters, (segment,) = segments()
    assert segment.values is adapters.values and (segment.rate, segment.until) == (1.0, 1.0)


def test_lora_plus_speeds_up_what_begins_at_zero():
    adapters, found = segments(lora_plus=16.0)
    assert len(found) == 2
    assert {name: rate for (_, name), (rate, _) in rates_of(adapters, found).items()} == {"down": 1.0, "up": 16.0}


def test_rates_by_pattern_and_by_network_multiply_and_the_last_line_wins():
    adapters, found = segments("widen = 2\n1.widen = 3\n^lora_te1_ = 4", two_parts(), lora_plus=10.0)
    rates = rates_of(adapters, found)
    assert rates["lora_unet_blocks_0_attend", "down"] == (1.0, 1.0)
    assert rates["lora_unet_blocks_0_widen", "down"] == (2.0, 1.0)
    assert rates["lora_unet_blocks_1_widen", "up"] == (30.0, 1.0)
    assert rates["lora_te1_blocks_1_widen", "down"] == (2.0, 0.25)
    assert rates["lora_te1_blocks_0_attend", "up"] == (20.0, 0.25)


def test_segments_cover_every_number_once_and_share_its_memory_and_gradient():
    adapters, found = segments("widen = 2", two_parts(), lora_plus=10.0, kind="dora", conv_rank=2)
    assert sum(segment.values.numel() for segment in found) == adapters.values.numel()
    for segment in found:
        segment.values.data.fill_(2.0)
        segment.values.grad.fill_(3.0)
    assert (adapters.values == 2).all() and (adapters.values.grad == 3).all()
    assert all((tensor == 2).all() and (tensor.grad == 3).all() for tensor in adapters.parameters())


@pytest.mark.parametrize(("decay", "of_the_word"), [(0.01, 0.01), (4.0, 0.1)])
def test_strong_weight_decay_is_for_layers_and_spares_new_words(decay, of_the_word):
    """The default is one segment still, so that states of earlier versions fit."""
    word = Adapter("word", "word", "", None, None, {"direction": nn.Parameter(torch.ones(3))}, most_decay=0.1)
    adapters = Adapters.build([part(Network())], LoraConfig(rank=2), seed=0, extra=[word])
    found = adapters.segments(TrainConfig(weight_decay=decay))
    (own,) = [one for one in found if covers(one.values, word.tensors["direction"])]
    assert own.decay == of_the_word and max(one.decay for one in found) == decay
    assert len(found) == (1 if decay == of_the_word else 3)


def test_a_rate_that_cannot_be_read_is_one_sentence():
    with pytest.raises(ValueError, match=r"^rates has the line 'widen'.*\.$"):
        segments("widen")


def test_patterns_that_fit_no_layer_are_said_and_those_that_fit_one_are_not():
    config = LoraConfig(include="nowhere", exclude="blocks.0", ranks="blocks.1 = 2\nmissing = 4", conv_rank=4)
    assert without_effect([(Network(), UNET)], config, "lora_unet_blocks = 2\ngone = 1") == [
        "include has the pattern 'nowhere', which fits no layer here.",
        "ranks has the pattern 'missing', which fits no layer here.",
        "rates has the pattern 'gone', which fits no layer here.",
        "conv_rank has no effect here: this model has no larger convolutions inside.",
    ]


def test_a_rank_for_convolutions_has_an_effect_where_there_are_some_between_the_first_and_the_last():
    network = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(3)))
    assert without_effect([(network, UNET)], LoraConfig(conv_rank=4), "") == []
