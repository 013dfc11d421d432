"""Averages of the adapters: a running one over all steps, and the mean of some checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from .lora import Adapters


def decay_at(step: int, decay: float) -> float:
    """How much of the average the 0-based `step` keeps: min((1 + n) / (10 + n), decay), OneTrainer's warm-up."""
    return min((1 + step) / (10 + step), decay)


class Average:
    """The exponential moving average of the adapters, beside them in memory; its decay is a function of the step."""

    def __init__(self, adapters: Adapters, decay: float, state: Mapping[str, Tensor] | None = None) -> None:
        """Begin with the adapters as they are, or with what `state` returned."""
        self._adapters, self._decay = adapters, decay
        self._values = adapters.values.detach().clone()
        if state is not None:
            self._swap()
            self._adapters.load(state)
            self._swap()

    def follow(self, step: int) -> None:
        """Take in the adapters after the 0-based `step`."""
        self._values.lerp_(self._adapters.values.detach(), 1 - decay_at(step, self._decay))

    def state(self) -> dict[str, Tensor]:
        """An owned copy with the names of `Adapters.state`."""
        self._swap()
        try:
            return self._adapters.state()
        finally:
            self._swap()

    def _swap(self) -> None:
        """Exchange the average with the adapters' own values."""
        own = self._adapters.values.data
        kept = own.clone()
        own.copy_(self._values)
        self._values.copy_(kept)


def averaged(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The mean of some files of the same adapters, in the last one's precision, read tensor by tensor.

    ValueError when there is none or they do not fit together.
    """
    if not paths:
        raise ValueError("There is no checkpoint to average: save at least one.")
    with ExitStack() as opened:
        files = [opened.enter_context(safe_open(path, framework="pt")) for path in paths]
        names = files[-1].keys()
        if any(set(file.keys()) != set(names) for file in files):
            raise ValueError("The checkpoints to average belong to different adapters: average those of one run only.")
        return {name: _mean([file.get_tensor(name) for file in files]) for name in names}


def _mean(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([tensor.float() for tensor in tensors]).mean(0).to(tensors[-1].dtype)
