"""The optimizer and its state as plain tensors, so that it can be written without pickle."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def adamw(parameters: Iterable[Tensor], weight_decay: float) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) with all parameters updated in one fused call; the rate is set every step."""
    return torch.optim.AdamW(list(parameters), lr=0.0, weight_decay=weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Use `rate` for the next step of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An owned copy of the optimizer's tensors, named `<parameter number>.<what>`."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{what}": value.detach().to("cpu", copy=True)
        for number, entry in state.items()
        for what, value in entry.items()
    }


def load_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Continue from what `state_of` returned, on whatever device the parameters are."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, what = name.split(".", 1)
        # Loading shares memory, and every step writes into it: without a copy the caller's tensors would change.
        state.setdefault(int(number), {})[what] = value.clone()
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
