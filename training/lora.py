"""Adapters: made by peft, kept outside the networks they adapt.

The host moves, patches and saves its own modules; it never meets these, because they are no part of its tree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, nn

from .config import HIGHEST_RATE, LoraConfig, TrainConfig
from .kinds import KINDS, Kind
from .kinds.kind import numbers
from .noise import generator
from .patterns import Overrides, last_match, overrides
from .targets import targets


@dataclass(frozen=True)
class Part:
    """One network that is adapted."""

    prefix: str
    """How its layers are called in a file: "lora_unet_", "lora_te1_", "lora_te2_"."""
    network: nn.Module
    layers: Mapping[str, str]
    """Layer preset -> pattern over the names of layers."""
    rate: float = 1.0
    """A factor on the learning rate."""
    until: float = 1.0
    """The fraction of the run after which nothing of it is trained any more."""


@dataclass(frozen=True)
class Adapter:
    """What is trained of one layer: float32 views into the memory of `Adapters`.

    `key` is the layer's name in a file, prefix and all. What is trained without a layer, such as the rows of a new
    word, has neither layer nor kind. `scale` is the factor of its kind, alpha / rank for most.
    """

    key: str
    name: str
    prefix: str
    layer: nn.Module | None
    kind: Kind | None
    tensors: dict[str, nn.Parameter]
    rate: float = 1.0
    until: float = 1.0
    scale: float = 1.0
    most_decay: float = math.inf
    """The most weight decay that does it good."""

    @property
    def down(self) -> nn.Parameter:
        """Of a LoRA: (rank, in), or (rank, in, h, w) of a convolution."""
        return self.tensors["down"]

    @property
    def up(self) -> nn.Parameter:
        """Of a LoRA: (rank, out), turned from what a file holds; or (out, rank, 1, 1) of a convolution."""
        return self.tensors["up"]

    @property
    def starts_at_zero(self) -> tuple[str, ...]:
        """The tensors that are zero at first, and that LoRA+ trains faster."""
        return self.kind.zero if self.kind else ()


@dataclass(frozen=True)
class Segment:
    """Numbers that lie side by side and are trained alike; `values` and its `grad` are views, not copies."""

    values: nn.Parameter = field(repr=False)
    rate: float
    until: float
    decay: float


def _narrowed(config: LoraConfig) -> str:
    """Which other settings may have left no layer."""
    names = [name for name in ("include", "exclude", "ranks") if getattr(config, name).strip()]
    return f" with {' and '.join(names)} as set" if names else ""


class Adapters:
    """The adapters of one or more networks, by the name of each layer in a file.

    All their numbers lie in one flat tensor, `values`, and all gradients in its `grad`: first all that is not zero at
    first (every down), then all that is (every up), in the networks' order. The optimizer, clipping and zeroing then
    are one call each instead of thousands.
    """

    def __init__(self, config: LoraConfig, members: dict[str, Adapter], seed: int = 0) -> None:
        self.config = config
        self.members = members
        self._seed, self._dropping = seed, None
        self._settle(torch.cat([tensor.detach().flatten() for _, _, tensor in self._in_memory()]))

    @classmethod
    def build(cls, parts: Sequence[Part], config: LoraConfig, seed: int, extra: Sequence[Adapter] = ()) -> Adapters:
        """Fresh adapters for every layer that `targets` chooses; they change nothing until trained.

        How each tensor begins is its kind's matter, drawn from `seed`. ValueError when no layer matches, or when a
        pattern cannot be read.
        """
        kind, members = KINDS[config.kind], {}
        for part in parts:
            for target in targets(part.network, part.prefix, part.layers, config):
                shapes = kind.shapes(target.layer, target.rank, config)
                tensors = {name: _trainable(shape) for name, shape in shapes.items()}
                kind.start(tensors, generator(seed, "adapter", len(members)))
                members[target.key] = Adapter(
                    target.key,
                    target.name,
                    part.prefix,
                    target.layer,
                    kind,
                    tensors,
                    part.rate,
                    part.until,
                    kind.scale(tensors, config),
                )
        if not members and parts:
            raise ValueError(
                f"None of the layers of this {type(parts[0].network).__name__} is one that '{config.layers}' adapts"
                f"{_narrowed(config)}: choose other layers, or a model whose family is supported."
            )
        return cls(config, members | {adapter.key: adapter for adapter in extra}, seed)

    def __iter__(self) -> Iterator[Adapter]:
        return iter(self.members.values())

    def __len__(self) -> int:
        return len(self.members)

    def of(self, prefix: str) -> list[Adapter]:
        """The adapters of one network's layers, in its order."""
        return [adapter for adapter in self if adapter.prefix == prefix and adapter.layer is not None]

    def parameters(self) -> list[nn.Parameter]:
        """All trainable tensors, in the networks' order."""
        return [tensor for adapter in self for tensor in adapter.tensors.values()]

    def segments(self, config: TrainConfig) -> list[Segment]:
        """The flat memory cut where the learning rate changes, by `lora_plus`, by `rates`, by network; or the decay.

        ValueError when a line of `rates` cannot be read.
        """
        rates = overrides(config.rates, "rates", HIGHEST_RATE)
        spans, start = [], 0
        for adapter, name, tensor in self._in_memory():
            rate = _rate(adapter, name, config.lora_plus, rates)
            spans.append((rate, adapter.until, min(config.weight_decay, adapter.most_decay), tensor.numel()))
        segments = []
        for settings, same in groupby(spans, key=lambda span: span[:-1]):
            end = start + sum(size for *_, size in same)
            segments.append(Segment(self._span(start, end), *settings))
            start = end
        return segments

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

    def limit_norms(self) -> int:
        """Shrink every change that is larger than `max_norm` to it, and say how many layers were cut.

        By sd-scripts' `scale_weight_norms`: each factor of the change times (limit / norm)^(1 / number of factors).
        """
        limit, cut = self.config.max_norm, 0
        adapters = [adapter for adapter in self if adapter.kind] if limit else []
        if not adapters:
            return 0
        with torch.no_grad():
            norms = torch.stack([adapter.kind.norm(adapter.tensors, adapter.scale) for adapter in adapters]).tolist()
            for adapter, norm in zip(adapters, norms, strict=True):
                if norm > limit:
                    factors = [adapter.tensors[name] for name in adapter.kind.factors if name in adapter.tensors]
                    for factor in factors:
                        factor.mul_((limit / norm) ** (1 / len(factors)))
                    cut += 1
        return cut

    @contextmanager
    def dropping(self, seed: int, number: int, part: int = 0) -> Iterator[None]:
        """Inside, adapter dropout leaves out what (seed, number, part, layer) says; outside, nothing is left out."""
        before, self._dropping = self._dropping, (seed, number, part)
        try:
            yield
        finally:
            self._dropping = before

    @contextmanager
    def dropping_as(self, state: tuple[int, int, int] | None) -> Iterator[None]:
        """As it was when `state` was `dropping_state`: what is computed again must leave out the same."""
        before, self._dropping = self._dropping, state
        try:
            yield
        finally:
            self._dropping = before

    @property
    def dropping_state(self) -> tuple[int, int, int] | None:
        """Which part's dropout of which micro-batch is on; None when none is."""
        return self._dropping

    def thinned(self, adapter: Adapter, x: Tensor) -> Tensor:
        """What an adapter reads: x, of which dropout leaves out a part and makes the rest larger by as much."""
        rate = self.config.dropout
        if not rate or self._dropping is None:
            return x
        seed, number, part = self._dropping
        purpose = f"dropout/{adapter.key}" + (f"/part {part}" if part else "")
        start = generator(seed, purpose, number).initial_seed()
        draw = torch.Generator(x.device).manual_seed(start)
        kept = torch.rand(x.shape, generator=draw, device=x.device) >= rate
        return x * (kept.to(x.dtype) / (1 - rate))

    def state(self) -> dict[str, Tensor]:
        """An owned float32 copy on the CPU: `<layer's key>.<tensor>`."""
        return {
            f"{adapter.key}.{name}": tensor.detach().to("cpu", copy=True)
            for adapter in self
            for name, tensor in adapter.tensors.items()
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Take over what `state` returned; ValueError when it belongs to other layers, another kind or rank."""
        with torch.no_grad():
            for adapter in self:
                for name, own in adapter.tensors.items():
                    saved = state.get(f"{adapter.key}.{name}")
                    if saved is None or saved.shape != own.shape:
                        raise ValueError(
                            f"The saved state does not fit layer '{adapter.name}' (rank or layers were changed): "
                            "use another name, or start over."
                        )
                    own.copy_(saved)

    def _in_memory(self) -> list[tuple[Adapter, str, nn.Parameter]]:
        tensors = [(adapter, name, tensor) for adapter in self for name, tensor in adapter.tensors.items()]
        return sorted(tensors, key=lambda entry: entry[1] in entry[0].starts_at_zero)

    def _settle(self, values: Tensor) -> None:
        """Make `values` the memory of every tensor, with gradients of its own."""
        self.values = nn.Parameter(values)
        self.values.grad = torch.zeros_like(values)
        start = 0
        for _, _, tensor in self._in_memory():
            there = slice(start, start + tensor.numel())
            tensor.data = self.values.data[there].view(tensor.shape)
            tensor.grad = self.values.grad[there].view(tensor.shape)
            start = there.stop

    def _span(self, start: int, end: int) -> nn.Parameter:
        if (start, end) == (0, self.values.numel()):
            return self.values
        span = nn.Parameter(self.values.data[start:end])
        span.grad = self.values.grad[start:end]
        return span


def trained_values(parts: Sequence[Part], config: LoraConfig) -> int:
    """How many numbers the adapters hold that `Adapters.build` makes for these networks, without making them."""
    kind = KINDS[config.kind]
    layers = (target for part in parts for target in targets(part.network, part.prefix, part.layers, config))
    return sum(numbers(kind.shapes(target.layer, target.rank, config)) for target in layers)


def _rate(adapter: Adapter, tensor: str, lora_plus: float, rates: Overrides) -> float:
    own = last_match(rates, adapter.name, adapter.key)
    return adapter.rate * (1.0 if own is None else own) * (lora_plus if tensor in adapter.starts_at_zero else 1.0)


def _trainable(shape: Sequence[int]) -> nn.Parameter:
    return nn.Parameter(torch.empty(tuple(shape), dtype=torch.float32))
