"""Optimizers over the adapters' flat memory, and their state as plain tensors, so that it is written without pickle.

The learning rate is a function of the step, set before each one; what a group of numbers makes of it (LoRA+, rates by
pattern, a network of its own) is its factor. Optimizers that are elementwise get whole segments; Adafactor gets
matrices, and Prodigy one learning rate for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from .config import ADAFACTOR, ADAMW, ADAMW_8BIT, LION, PRODIGY, SCHEDULE_FREE, TrainConfig
from .lora import Adapters

EXTRAS = {ADAMW_8BIT: "bitsandbytes", PRODIGY: "prodigyopt", ADAFACTOR: "transformers"}
"""The Python package that an optimizer needs."""
CHANGING = (
    "k", "weight_sum", "rate_max", "d", "d_max", "d_hat", "d_numerator", "d_denom",
)  # fmt: skip
"""Numbers of a group that are part of the state (Prodigy, schedule-free)."""
FUSED = ("cpu", "cuda", "mps", "xpu")
"""Devices that have a fused AdamW."""


def optimizer_for(adapters: Adapters, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of `config`, one group for each learning rate; ValueError when it cannot be had here."""
    require(config.optimizer)
    groups = _groups(adapters, config)
    try:
        return BUILDERS[config.optimizer](groups)
    except (RuntimeError, NotImplementedError, AttributeError, OSError) as error:
        raise ValueError(
            f"optimizer '{config.optimizer}' does not work here ({error}): choose optimizer '{ADAMW}'."
        ) from error


def require(optimizer: str) -> None:
    """ValueError with the pip command when the package that an optimizer needs is not installed."""
    package = EXTRAS.get(optimizer)
    if package and find_spec(package) is None:
        raise ValueError(
            f"optimizer '{optimizer}' needs the Python package {package}: install it with "
            f"'python -m pip install {package}' and restart, or choose optimizer '{ADAMW}'."
        )


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float, done: float = 0.0) -> None:
    """Use `rate` for the next step; groups whose time is over at `done` (0 to 1) stand still from here on."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)
        if done >= group.get("until", 1.0) and "still" not in group:
            group["still"] = [parameter.grad for parameter in group["params"]]
            for parameter in group["params"]:
                parameter.grad = None


def forget_still(optimizer: torch.optim.Optimizer) -> None:
    """Take the gradients of what stands still out of the whole, whose norm would count them."""
    for group in optimizer.param_groups:
        for gradient in group.get("still", ()):
            gradient.zero_()


@contextmanager
def training_weights(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the adapters are where gradients are taken; outside, what a file holds. They differ for schedule-free."""
    if not isinstance(optimizer, ScheduleFree):
        yield
        return
    optimizer.leave_average()
    try:
        yield
    finally:
        optimizer.return_to_average()


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An owned copy of the optimizer's state: `<parameter number>.<what>`, and `group<number>.<what>` for its numbers.

    Plain numbers are kept in double precision and named with "=" at the end.
    """
    tensors = {}
    for number, group in enumerate(optimizer.param_groups):
        tensors |= {f"group{number}.{what}=": _exact(group[what]) for what in CHANGING if what in group}
    for number, parameter in enumerate(_parameters(optimizer)):
        for what, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{what}"] = value.detach().to("cpu", copy=True)
            elif value is not None:
                tensors[f"{number}.{what}="] = _exact(value)
    return tensors


def load_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Continue from what `state_of` returned, on whatever device the parameters are; the tensors stay the caller's."""
    parameters = list(_parameters(optimizer))
    for name, value in tensors.items():
        owner, what = name.split(".", 1)
        if owner.startswith("group"):
            optimizer.param_groups[int(owner[5:])][what[:-1]] = _number(value)
            continue
        parameter = parameters[int(owner)]
        entry = optimizer.state[parameter]
        if what.endswith("="):
            entry[what[:-1]] = _number(value)
        else:
            entry[what] = value.to(parameter.device, copy=True)


def _exact(value: float | Tensor) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64)


def _number(value: Tensor) -> float | int:
    number = value.item()
    return int(number) if number.is_integer() else number


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _groups(adapters: Adapters, config: TrainConfig) -> list[dict[str, Any]]:
    """A group for each segment; its parameters are the segment, or for Adafactor the tensors that lie in it."""
    groups = []
    for segment in adapters.segments(config):
        group = {"factor": segment.rate, "until": segment.until, "weight_decay": segment.decay}
        if config.optimizer != ADAFACTOR:
            groups.append({"params": [_alias(segment.values)], **group})
            continue
        start = segment.values.storage_offset()
        inside = range(start, start + segment.values.numel())
        tensors = [tensor for tensor in adapters.parameters() if tensor.storage_offset() in inside]
        groups.append({"params": [_alias(tensor) for tensor in tensors], **group})
    return groups


def _alias(values: nn.Parameter) -> nn.Parameter:
    """A parameter of the same memory, which may lose its gradient without anybody noticing."""
    alias = nn.Parameter(values.data)
    alias.grad = values.grad
    return alias


def _adamw(groups: list[dict]) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) with all parameters updated in one fused call."""
    fused = groups[0]["params"][0].device.type in FUSED
    return torch.optim.AdamW(groups, lr=0.0, fused=fused)


def _adamw_8bit(groups: list[dict]) -> torch.optim.Optimizer:
    """AdamW with both moments in 8 bits, in blocks of their own scale (Dettmers et al. 2022)."""
    from bitsandbytes.optim import AdamW8bit

    device = groups[0]["params"][0].device
    # Whether this device has the kernels shows in a step only.
    probe = nn.Parameter(torch.zeros(8192, device=device))
    probe.grad = torch.ones_like(probe)
    AdamW8bit([probe], lr=1e-3).step()
    return AdamW8bit(groups, lr=0.0)


def _adafactor(groups: list[dict]) -> torch.optim.Optimizer:
    """Adafactor (Shazeer & Stern 2018) at a given rate, without scaling by the size of the parameter.

    Scaled so, an up factor, which begins at zero, would learn at a thousandth of the rate. torch's own always scales,
    and waits for the device twice a matrix.
    """
    from transformers.optimization import Adafactor

    return Adafactor(groups, lr=0.0, scale_parameter=False, relative_step=False, warmup_init=False)


def _prodigy(groups: list[dict]) -> torch.optim.Optimizer:
    """Prodigy (Mishchenko & Defazio 2023) with bias correction and its safeguard for warm-up."""
    from prodigyopt import Prodigy

    return Prodigy(groups, lr=1.0, use_bias_correction=True, safeguard_warmup=True)


class Lion(torch.optim.Optimizer):
    """Lion (Chen et al. 2023, algorithm 2): the sign of a mixture of gradient and momentum, and decoupled decay."""

    def __init__(self, groups: list[dict], betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group, parameter in _with_gradient(self):
            mixed, kept = group["betas"]
            state = self.state[parameter]
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter)
            momentum = state["exp_avg"]
            direction = torch.lerp(parameter.grad, momentum, mixed).sign_()
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
            momentum.lerp_(parameter.grad, 1 - kept)


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free AdamW (Defazio et al. 2024, algorithm 1): between steps the parameters are the average, x.

    Gradients are taken at y = (1 - beta) z + beta x, which is made anew from x and z for each step and never kept; so
    going back and forth loses no bit, and what is read between steps is what a file should hold.
    """

    def __init__(self, groups: list[dict], betas: tuple[float, float] = (0.9, 0.999)) -> None:
        defaults = {"lr": 0.0, "betas": betas, "eps": 1e-8}
        super().__init__(groups, defaults | {"k": 0, "weight_sum": 0.0, "rate_max": 0.0})
        self._average: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def leave_average(self) -> None:
        """Go from x to y."""
        for group, parameter in _with_gradient(self):
            fast = self.state[parameter].get("z")
            if fast is not None:
                self._average[parameter] = parameter.detach().clone()
                parameter.lerp_(fast, 1 - group["betas"][0])

    @torch.no_grad()
    def return_to_average(self) -> None:
        """Go from y to x, which a step has moved in the meantime or not."""
        for parameter, average in self._average.items():
            parameter.copy_(average)
        self._average.clear()

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step from the gradients at y; leaves x in the parameters."""
        for group, parameter in _with_gradient(self):
            state = self.state[parameter]
            if not state:
                state["z"], state["exp_avg_sq"] = parameter.detach().clone(), torch.zeros_like(parameter)
            count, decay = group["k"] + 1, group["betas"][1]
            group["rate_max"] = max(group["rate_max"], group["lr"])
            weight = group["rate_max"] ** 2
            group["weight_sum"] += weight
            group["k"] = count
            state["exp_avg_sq"].mul_(decay).addcmul_(parameter.grad, parameter.grad, value=1 - decay)
            scale = (state["exp_avg_sq"] / (1 - decay**count)).sqrt_().add_(group["eps"])
            direction = (parameter.grad / scale).add_(parameter, alpha=group["weight_decay"])
            state["z"].sub_(direction, alpha=group["lr"])
            average = self._average.pop(parameter, parameter)
            parameter.copy_(torch.lerp(average, state["z"], weight / (group["weight_sum"] or 1.0)))


def _with_gradient(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict, nn.Parameter]]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield group, parameter


BUILDERS: dict[str, Callable[[list[dict]], torch.optim.Optimizer]] = {
    ADAMW: _adamw,
    ADAMW_8BIT: _adamw_8bit,
    ADAFACTOR: _adafactor,
    PRODIGY: _prodigy,
    LION: Lion,
    SCHEDULE_FREE: ScheduleFree,
}
