"""An adapted network, for as long as a `with` block lasts.

Each forward that must change is set on the instance and removed again on any exit. Class, module tree, weights, hooks
and flags of the network are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .config import LORA, LoraConfig
from .frozen import Adapted, AdaptedLinears, Weights, forward_of, is_linear
from .lora import Adapter, Adapters
from .memory import EVERY_BLOCK, EVERY_SECOND_BLOCK, NO_BLOCK
from .targets import UNET

Overrides = list[tuple[dict[str, object], Callable[..., object]]]


class Attachment:
    """The forwards that turn a network into an adapted one; prepared once, attached for each step."""

    def __init__(
        self,
        network: nn.Module,
        adapters: Adapters,
        weights: Weights,
        *,
        prefix: str = UNET,
        blocks: Sequence[str] = (),
        recompute: str = EVERY_BLOCK,
        adds_in_place: bool = False,
        same_input: Sequence[Sequence[str]] = (),
    ) -> None:
        """`prefix` says which of the adapters are this network's.

        `blocks` names the classes whose instances are recomputed in backward, as many of them as `recompute` says.

        `same_input` names layers, by the ends of their names, that are called in turn with one input.
        """
        own = adapters.of(prefix)
        for adapter in own:
            adapter.kind.begin(adapter.layer, adapter.tensors, adapter.scale, weights)
        fused = [adapter for adapter in own if _is_plain(adapter, adapters.config)]
        self._shared = [_SharedInput(group, adapters, weights) for group in _groups(fused, same_input)]
        adapted = {id(adapter.layer): _forward_of(adapter, adapters, weights) for adapter in own}
        adapted |= {
            id(adapter.layer): shared.forward_of(adapter) for shared in self._shared for adapter in shared.group
        }
        self._overrides: Overrides = []
        again = _chosen_blocks(network, blocks, recompute)
        for module in network.modules():
            if (forward := adapted.get(id(module))) is not None:
                pass
            elif id(module) in again:
                forward = _recomputed(module, adapters, adds_in_place)
            else:
                forward = forward_of(module, weights, copy_norm_input=adds_in_place)
            if forward is not None:
                self._overrides.append((module.__dict__, _of_scaled_input(module, forward)))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The network computes with its adapters inside this block, and is what it was after it."""
        before = [instance.get("forward") for instance, _ in self._overrides]
        try:
            for instance, forward in self._overrides:
                instance["forward"] = forward
            yield
        finally:
            for shared in self._shared:
                shared.forget()
            for (instance, _), own in zip(self._overrides, before, strict=True):
                instance.pop("forward", None)
                if own is not None:
                    instance["forward"] = own


class _SharedInput:
    """Layers that read one input: the first to be called computes for all, the others find their answer waiting.

    A layer that is called with another input than the first was simply computes again, so nothing depends on the order.
    """

    def __init__(self, group: Sequence[Adapter], adapters: Adapters, weights: Weights) -> None:
        self.group = group
        downs, downs_grad = adapters.joined_downs(group)
        self._adapted = Adapted(
            layers=tuple(adapter.layer for adapter in group),
            downs=downs,
            ups=tuple(adapter.up.detach() for adapter in group),
            downs_grad=downs_grad,
            ups_grad=tuple(adapter.up.grad for adapter in group),
            scale=group[0].scale,
            weights=weights,
        )
        self.forget()

    def forget(self) -> None:
        """Drop answers nobody fetched."""
        self._input: tuple[Tensor, int] | None = None
        self._waiting: dict[int, Tensor] = {}

    def forward_of(self, adapter: Adapter) -> Callable[[Tensor], Tensor]:
        """The forward of one of the layers."""
        adapted = self._adapted
        if len(self.group) == 1:
            return lambda x: AdaptedLinears.apply(x, adapted.downs, adapted)[0]
        number = adapted.layers.index(adapter.layer)
        return lambda x: self._answer(number, x)

    def _answer(self, number: int, x: Tensor) -> Tensor:
        known = self._input is not None and self._input[0] is x and self._input[1] == x._version
        if not known or number not in self._waiting:
            answers = AdaptedLinears.apply(x, self._adapted.downs, self._adapted)
            self._input, self._waiting = (x, x._version), dict(enumerate(answers))
        answer = self._waiting.pop(number)
        if not self._waiting:
            self._input = None
        return answer


def _is_plain(adapter: Adapter, config: LoraConfig) -> bool:
    """Whether it is a LoRA on a linear layer that reads its whole input, which `AdaptedLinears` computes fastest."""
    return config.kind == LORA and not config.dropout and is_linear(adapter.layer)


def _forward_of(adapter: Adapter, adapters: Adapters, weights: Weights) -> Callable[[Tensor], Tensor]:
    thinned = partial(adapters.thinned, adapter)
    return adapter.kind.forward(adapter.layer, adapter.tensors, adapter.scale, weights, thinned)


def _groups(adapters: Iterable[Adapter], same_input: Sequence[Sequence[str]]) -> list[list[Adapter]]:
    """The adapters; those that follow one another with one name up to ends listed side by side are one group.

    So long as they have one rank and one scale, since all their downs are multiplied with as one matrix.
    """

    def shared(adapter: Adapter) -> object:
        for ends in same_input:
            for end in ends:
                if adapter.name.endswith(end):
                    return adapter.name.removesuffix(end), tuple(ends), len(adapter.down), adapter.scale
        return adapter.name

    return [list(group) for _, group in groupby(adapters, key=shared)]


def _chosen_blocks(network: nn.Module, classes: Sequence[str], recompute: str) -> set[int]:
    """The ids of the blocks that are recomputed; every second one is so within each class, since classes differ."""
    among = {name: [id(module) for module in network.modules() if type(module).__name__ == name] for name in classes}
    every = {NO_BLOCK: 0, EVERY_SECOND_BLOCK: 2, EVERY_BLOCK: 1}[recompute]
    return {number for numbers in among.values() for number in (numbers[::every] if every else ())}


def _recomputed(block: nn.Module, adapters: Adapters, adds_in_place: bool) -> Callable[..., object]:
    """A block's forward that keeps its inputs and nothing else until backward."""
    own_forward = block.forward

    def run(dropping, *args, **kwargs):
        # The copies are made inside, so that recomputing starts from the inputs the block was given. Blocks also
        # write into the options they are handed, so each run gets a dictionary of its own.
        own = partial(_own, copy_tensors=adds_in_place)
        with adapters.dropping_as(dropping):
            return own_forward(*map(own, args), **{name: own(value) for name, value in kwargs.items()})

    def forward(*args, **kwargs):
        state = adapters.dropping_state
        return checkpoint(run, state, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return forward


def _of_scaled_input(layer: nn.Module, forward: Callable[..., object]) -> Callable[..., object]:
    """A layer that was smoothed before it was quantised multiplies its input first (Lin et al. 2023, section 3.2)."""
    if getattr(layer, "pre_quant_scale", None) is None:
        return forward
    return lambda x: forward(x * layer.pre_quant_scale.to(x, copy=True))


def _own(value: object, copy_tensors: bool) -> object:
    if copy_tensors and isinstance(value, Tensor) and torch.is_floating_point(value):
        return value.clone()
    return dict(value) if isinstance(value, dict) else value
