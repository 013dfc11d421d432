"""Adapters: made by peft, kept outside the network they adapt.

The host moves, patches and saves its own modules; it never meets these, because they are no part of its tree.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .config import LoraConfig
from .frozen import is_linear
from .noise import generator


@dataclass(frozen=True)
class Adapter:
    """One adapted linear layer: down (rank, in) and up (rank, out), float32 views into the memory of `Adapters`.

    In a file up is (out, rank). Here it is turned, because the product that makes its gradient is faster so.
    """

    name: str
    layer: nn.Module
    down: nn.Parameter
    up: nn.Parameter


class Adapters:
    """The adapters of a network, by the dotted name of the layer each belongs to.

    All their numbers lie in one flat tensor, `values`, and all gradients in its `grad`: first every down, then every
    up, in the network's order. The optimizer, clipping and zeroing then are one call each instead of thousands.
    """

    def __init__(self, config: LoraConfig, members: dict[str, Adapter]) -> None:
        self.config = config
        self.members = members
        self._settle(torch.cat([tensor.detach().flatten() for tensor in self._in_memory()]))

    @classmethod
    def build(cls, network: nn.Module, config: LoraConfig, pattern: re.Pattern[str], seed: int) -> Adapters:
        """Fresh adapters for every linear layer whose name matches; they change nothing until trained.

        Down is Kaiming-uniform with a = sqrt(5) and up is zero, as in Hu et al.'s reference code, drawn from `seed`.
        ValueError when no layer matches.
        """
        layers = {
            name: module for name, module in network.named_modules() if pattern.search(name) and is_linear(module)
        }
        if not layers:
            raise ValueError(
                f"None of the layers of this {type(network).__name__} is one that '{config.layers}' adapts: "
                "choose other layers, or a model whose family is supported."
            )
        members = {name: _adapter(name, layer, config) for name, layer in layers.items()}
        for number, adapter in enumerate(members.values()):
            nn.init.kaiming_uniform_(adapter.down, a=math.sqrt(5), generator=generator(seed, "adapter", number))
            nn.init.zeros_(adapter.up)
        return cls(config, members)

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self.members.values())

    def __len__(self) -> int:
        return len(self.members)

    def parameters(self) -> list[nn.Parameter]:
        """All trainable tensors, down before up, in the network's order."""
        return [tensor for adapter in self for tensor in (adapter.down, adapter.up)]

    def joined_downs(self, group: Sequence[Adapter]) -> tuple[Tensor, Tensor]:
        """The down factors of adapters that follow one another as one matrix (n rank, in), and its gradient, uncopied.

        ValueError when other adapters lie between them.
        """
        first, size = group[0].down, sum(adapter.down.numel() for adapter in group)
        start = first.storage_offset()
        ends = [adapter.down.storage_offset() + adapter.down.numel() for adapter in group]
        if ends[-1] != start + size:
            raise ValueError(f"The adapters {[adapter.name for adapter in group]} do not follow one another.")
        shape = (-1, first.shape[1])
        values, gradient = (tensor[start : start + size].view(shape) for tensor in (self.values.data, self.values.grad))
        return values.requires_grad_(), gradient

    def zero_grad(self) -> None:
        """Start the gradients of a step at zero."""
        self.values.grad.zero_()

    def to(self, device: torch.device) -> Adapters:
        """Move every adapter to where the network computes; gradients start at zero there."""
        if self.values.device != device:
            self._settle(self.values.detach().to(device))
        return self

    def _in_memory(self) -> list[nn.Parameter]:
        return [adapter.down for adapter in self] + [adapter.up for adapter in self]

    def _settle(self, values: Tensor) -> None:
        """Make `values` the memory of every factor, with gradients of its own."""
        self.values = nn.Parameter(values)
        self.values.grad = torch.zeros_like(values)
        start = 0
        for tensor in self._in_memory():
            there = slice(start, start + tensor.numel())
            tensor.data = self.values.data[there].view(tensor.shape)
            tensor.grad = self.values.grad[there].view(tensor.shape)
            start = there.stop

    def state(self) -> dict[str, Tensor]:
        """An owned float32 copy on the CPU: `<layer>.down` and `<layer>.up`."""
        return {
            f"{adapter.name}.{part}": getattr(adapter, part).detach().to("cpu", copy=True)
            for adapter in self
            for part in ("down", "up")
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned; ValueError when it belongs to other layers or another rank."""
        with torch.no_grad():
            for adapter in self:
                for part in ("down", "up"):
                    own, saved = getattr(adapter, part), state.get(f"{adapter.name}.{part}")
                    if saved is None or saved.shape != own.shape:
                        raise ValueError(
                            f"The saved state does not fit layer '{adapter.name}' (rank or layers were changed): "
                            "use another name, or start over."
                        )
                    own.copy_(saved)


def _adapter(name: str, layer: nn.Module, config: LoraConfig) -> Adapter:
    """peft's own layer around a stand-in of the same shape; only its factors are kept."""
    from peft import LoraConfig as PeftConfig
    from peft.tuners.lora import Linear

    settings = PeftConfig(r=config.rank, lora_alpha=config.alpha or config.rank, init_lora_weights=False)
    # On the meta device nothing is allocated and no global random number is drawn.
    with torch.device("meta"):
        shape = nn.Linear(layer.in_features, layer.out_features, bias=False)
        peft_layer = Linear(shape, "default", settings, r=settings.r, lora_alpha=settings.lora_alpha)
    down, up = peft_layer.lora_A["default"].weight, peft_layer.lora_B["default"].weight
    return Adapter(name, layer, _trainable(down.shape), _trainable(up.t().shape))


def _trainable(shape: torch.Size) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.float32))
