"""Which layers of a network are adapted, and with which rank.

A preset of the family says which at first. `include` adds layers, `exclude` takes some away, `ranks` has the last word.
Patterns are looked for in a layer's dotted name and in its name in the file, such as `lora_te1_text_model_...`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from .config import HIGHEST_RANK, HIGHEST_RATE, LoraConfig
from .frozen import is_linear
from .patterns import last_match, overrides, patterns

UNET = "lora_unet_"
"""What the names of a denoiser's layers begin with in a file."""


@dataclass(frozen=True)
class Target:
    """One layer to adapt; `key` is its name in a LoRA file."""

    name: str
    key: str
    layer: nn.Module
    rank: int


def targets(network: nn.Module, prefix: str, layers: Mapping[str, str], config: LoraConfig) -> list[Target]:
    """The layers of a network that are adapted, in its order.

    Linear layers and 1 x 1 convolutions are adapted when the preset or `include` names them, with `rank`. `conv_rank`
    adapts all larger convolutions too, but not the first and the last, which read and write latents. ValueError when
    the preset is unknown to this network or a line of a setting cannot be read.
    """
    if config.layers not in layers:
        raise ValueError(f"Unknown layers '{config.layers}': choose one of {', '.join(map(repr, layers))}.")
    preset = re.compile(layers[config.layers])
    include, exclude = patterns(config.include, "include"), patterns(config.exclude, "exclude")
    ranks = overrides(config.ranks, "ranks", HIGHEST_RANK, whole=True)
    outermost = _outermost_convolutions(network)
    chosen = []
    for name, layer in _adaptable(network):
        key = file_key(prefix, name)
        rank = 0
        if _small(layer):
            rank = config.rank if preset.search(name) else 0
        elif name not in outermost:
            rank = config.conv_rank
        if not rank and _any(include, name, key):
            rank = config.rank if _small(layer) else config.conv_rank or config.rank
        if _any(exclude, name, key):
            rank = 0
        if rank and (own := last_match(ranks, name, key)) is not None:
            rank = int(own)
        if rank:
            chosen.append(Target(name, key, layer, rank))
    return chosen


def without_effect(networks: Sequence[tuple[nn.Module, str]], config: LoraConfig, rates: str) -> list[str]:
    """A sentence for each setting about layers that fits none in the networks, which come with their prefixes."""
    layers = [(name, file_key(prefix, name)) for network, prefix in networks for name, _ in _adaptable(network)]
    lines = {
        "include": patterns(config.include, "include"),
        "exclude": patterns(config.exclude, "exclude"),
        "ranks": [pattern for pattern, _ in overrides(config.ranks, "ranks", HIGHEST_RANK, whole=True)],
        "rates": [pattern for pattern, _ in overrides(rates, "rates", HIGHEST_RATE)],
    }
    found = [
        f"{setting} has the pattern '{pattern.pattern}', which fits no layer here."
        for setting, some in lines.items()
        for pattern in some
        if not any(pattern.search(name) for names in layers for name in names)
    ]
    if config.conv_rank and not any(_inner_convolutions(network) for network, _ in networks):
        found.append("conv_rank has no effect here: this model has no larger convolutions inside.")
    return found


def file_key(prefix: str, name: str) -> str:
    """A layer's name in a LoRA file: kohya's, with an underscore for every dot."""
    return prefix + name.replace(".", "_")


def is_convolution(layer: nn.Module) -> bool:
    """A two-dimensional convolution that mixes all its channels, which is the only kind adapters are made for."""
    return isinstance(layer, nn.Conv2d) and layer.groups == 1


def _adaptable(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, layer) for name, layer in network.named_modules() if is_linear(layer) or is_convolution(layer))


def _small(layer: nn.Module) -> bool:
    return not is_convolution(layer) or layer.kernel_size == (1, 1)


def _inner_convolutions(network: nn.Module) -> list[str]:
    outermost = _outermost_convolutions(network)
    return [name for name, layer in _adaptable(network) if not _small(layer) and name not in outermost]


def _outermost_convolutions(network: nn.Module) -> tuple[str, ...]:
    names = [name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d)]
    return (names[0], names[-1]) if names else ()


def _any(some: list[re.Pattern[str]], *names: str) -> bool:
    return any(pattern.search(name) for pattern in some for name in names)
