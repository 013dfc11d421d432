"""An adapted network, for as long as a `with` block lasts.

Each forward that must change is set on the instance and removed again on any exit. Class, module tree, weights, hooks
and flags of the network are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .frozen import AdaptedLinear, Weights, forward_of
from .lora import Adapters

Overrides = list[tuple[dict[str, object], Callable[..., object]]]


class Attachment:
    """The forwards that turn a network into an adapted one; prepared once, attached for each step."""

    def __init__(
        self,
        network: nn.Module,
        adapters: Adapters,
        weights: Weights,
        *,
        blocks: Sequence[str] = (),
        adds_in_place: bool = False,
    ) -> None:
        """`blocks` names the classes whose instances are recomputed in backward; empty keeps every activation."""
        adapted = {id(adapter.layer): adapter for adapter in adapters}
        scale = adapters.config.scale
        self._overrides: Overrides = []
        for module in network.modules():
            if (adapter := adapted.get(id(module))) is not None:
                forward = _adapted(adapter.layer, adapter.down, adapter.up, scale, weights)
            elif type(module).__name__ in blocks:
                forward = _recomputed(module, adds_in_place)
            else:
                forward = forward_of(module, weights, copy_norm_input=adds_in_place)
            if forward is not None:
                self._overrides.append((module.__dict__, forward))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """The network computes with its adapters inside this block, and is what it was after it."""
        before = [instance.get("forward") for instance, _ in self._overrides]
        try:
            for instance, forward in self._overrides:
                instance["forward"] = forward
            yield
        finally:
            for (instance, _), own in zip(self._overrides, before, strict=True):
                instance.pop("forward", None)
                if own is not None:
                    instance["forward"] = own


def _adapted(layer: nn.Module, down: Tensor, up: Tensor, scale: float, weights: Weights) -> Callable[[Tensor], Tensor]:
    return lambda x: AdaptedLinear.apply(x, down, up, scale, layer, weights)


def _recomputed(block: nn.Module, adds_in_place: bool) -> Callable[..., object]:
    """A block's forward that keeps its inputs and nothing else until backward."""
    own_forward = block.forward

    def run(*args, **kwargs):
        # The copies are made inside, so that recomputing starts from the inputs the block was given. Blocks also
        # write into the options they are handed, so each run gets a dictionary of its own.
        own = partial(_own, copy_tensors=adds_in_place)
        return own_forward(*map(own, args), **{name: own(value) for name, value in kwargs.items()})

    return lambda *args, **kwargs: checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _own(value: object, copy_tensors: bool) -> object:
    if copy_tensors and isinstance(value, Tensor) and torch.is_floating_point(value):
        return value.clone()
    return dict(value) if isinstance(value, dict) else value
