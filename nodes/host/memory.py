"""What is free on the device, what a step really takes, and the plan that follows from both."""

from __future__ import annotations

import gc
import re
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import comfy.model_management as mm
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ...training.lora import Adapters
from ...training.memory import RECOMPUTE, RESIDENT, Choices, MemoryPlan, Needs, fits, trained_bytes

if TYPE_CHECKING:
    from .model import LoadedModel


class DeviceFull(RuntimeError):
    """The device is out of memory, and said so by another error than torch's own for that."""


OUT_OF_MEMORY: tuple[type[BaseException], ...] = (
    # Where torch has no such exception, ComfyUI's name for it is `Exception` itself.
    *((mm.OOM_EXCEPTION,) if mm.OOM_EXCEPTION is not Exception else (MemoryError,)),
    DeviceFull,
)
_FULL = re.compile(r"out of memory|STATUS_ALLOC_FAILED|not enough (GPU video )?memory|can't allocate memory", re.I)
"""What CUDA and its libraries, Apple's and AMD's devices, DirectML and the CPU say when memory runs out."""
MOST_TRIES = 3
"""How often a plan is changed because a step took less or more than was predicted."""
_GIB = 1024**3


@dataclass(frozen=True)
class Measured:
    """What a step takes under the plan that was settled on."""

    plan: MemoryPlan
    needs: Needs
    peak_bytes: int
    """On the device at the worst moment, weights included."""
    free_bytes: int
    """What there is for it."""
    seconds: float
    """Of one forward and backward of the batch."""
    notes: tuple[str, ...]
    """What moved when memory ran out, in words."""


def free_bytes(patcher) -> int:
    """Bytes that a training of this MODEL may use on its device: what is free, and what ComfyUI would unload for it."""
    device = patcher.load_device
    if not _has_memory_of_its_own(patcher):
        return int(mm.get_free_memory(device)) + patcher.model_size()
    loaded = sum(model.model_loaded_memory() for model in mm.current_loaded_models if model.device == device)
    return int(mm.get_free_memory(device) + loaded - mm.extra_reserved_memory())


def choices_for(patcher, batch: int, recompute: tuple[str, ...] = RECOMPUTE) -> Choices:
    """The plans that are open: weights stream only to a device that has memory of its own, and from another."""
    streams = _has_memory_of_its_own(patcher) and patcher.offload_device != patcher.load_device
    return Choices(batch, recompute, RESIDENT if streams else (1.0,))


@contextmanager
def telling_out_of_memory() -> Iterator[None]:
    """Whatever runs out of memory inside does so by an exception of `OUT_OF_MEMORY`."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, OUT_OF_MEMORY) or not _is_full(error):
            raise
        raise DeviceFull(str(error)) from error


def _is_full(error: RuntimeError) -> bool:
    # ComfyUI's own check also clears what CUDA would say again at its next call; versions before 0.16 have none.
    return getattr(mm, "is_oom", lambda _: False)(error) or _FULL.search(str(error)) is not None


def _has_memory_of_its_own(patcher) -> bool:
    return not (mm.is_device_cpu(patcher.load_device) or mm.is_device_mps(patcher.load_device))


def needs_of(
    denoiser: LoadedModel, values: int, size: tuple[int, int], batch: int, optimizer: str, averaged: bool
) -> Needs:
    """What is predicted for a batch of pictures of `size` and so many trained `values`, from the family's figures."""
    activations = denoiser.family.activations_gib * _GIB * batch * size[0] * size[1] / 1024**2
    wide = denoiser.dtype.itemsize
    return Needs(
        weights=denoiser.patcher.model_size(),
        activations=int(activations * wide / 2),
        adapters=trained_bytes(values, optimizer, averaged),
        largest_layer=max(parameter.numel() for parameter in denoiser.network.parameters()) * wide,
        beside=sum(patcher.model_size() for patcher in denoiser.patchers[1:]),
    )


def preflight(
    denoiser: LoadedModel, adapters: Adapters, backward: Callable[[], object], choices: Choices, needs: Needs
) -> Measured:
    """Settle on a plan by trying it: `backward` computes the loss of the largest batch and its gradients, no more.

    The plan steps down when memory runs out, and moves up or down when the prediction was wrong. The adapters keep
    their values; their gradients are zero afterwards. MemoryError with a sentence when the smallest plan is too large.
    """
    plan = choices.fitting(needs, free_bytes(denoiser.patcher))
    too_large: list[MemoryPlan] = []
    notes: list[str] = []
    tried: dict[MemoryPlan, Measured] = {}
    while True:
        try:
            denoiser.prepare(adapters, plan, needs)
            measured = _measure(denoiser, adapters, backward, plan, needs)
        except OUT_OF_MEMORY:
            measured = None
        if measured is None:
            # Only here, outside the handler, is what the failed step held really gone.
            give_back_memory()
            too_large.append(plan)
            step = choices.stepped_down(plan)
            if step is None:
                raise MemoryError(too_little(denoiser))
            plan, moved = step
            notes.append(f"Out of memory: {moved}.")
            continue
        tried[plan] = measured
        better = _smaller_than(too_large, choices, choices.fitting(measured.needs, measured.free_bytes))
        if better in tried or len(tried) == MOST_TRIES:
            settled = plan if fits(measured.peak_bytes, measured.free_bytes) else better
            measured = tried.get(settled, measured)
            denoiser.prepare(adapters, settled, measured.needs)
            return replace(measured, plan=settled, notes=tuple(notes))
        plan, needs = better, measured.needs


def _smaller_than(too_large: list[MemoryPlan], choices: Choices, plan: MemoryPlan) -> MemoryPlan:
    """The plan, or the first after the last that ran out of memory."""
    order = list(choices)
    after = max((order.index(failed) + 1 for failed in too_large), default=0)
    return order[max(after, order.index(plan))]


def too_little(denoiser: LoadedModel) -> str:
    """The sentence for when nothing is left to give up."""
    free = free_bytes(denoiser.patcher) / _GIB
    return (
        f"Training this {denoiser.family.title} model does not fit into the {free:.1f} GB of memory that are free, "
        "even with the smallest plan: lower the dataset's resolution or the rank, or close what else uses the device."
    )


def give_back_memory() -> None:
    """Return what nobody holds any more to the device."""
    gc.collect()
    mm.soft_empty_cache()


def _measure(
    denoiser: LoadedModel, adapters: Adapters, backward: Callable[[], object], plan: MemoryPlan, needs: Needs
) -> Measured:
    """Peak and time of a pass; the first pass is for the memory, and warms up for the second, which is for the time."""
    free = free_bytes(denoiser.patcher)
    try:
        # The optimizer's state and the averaged copy are not made yet.
        beside = needs.adapters - 2 * adapters.values.nbytes
        peak = _peak_of(backward, denoiser, adapters, plan) + beside
        started = _now(denoiser.device)
        backward()
        seconds = _now(denoiser.device) - started
    finally:
        adapters.zero_grad()
    return Measured(plan, needs.corrected(plan, peak), peak, free, seconds, ())


def _peak_of(backward: Callable[[], object], denoiser: LoadedModel, adapters: Adapters, plan: MemoryPlan) -> int:
    """Bytes of this training on the device at the worst moment of a pass, weights, adapters and gradients included."""
    device = denoiser.device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        loaded = [held for held in mm.current_loaded_models if held.device == device and held.model is not None]
        others = [held for held in loaded if not denoiser.is_ours(held.model) and not is_dynamic(held.model)]
        torch.cuda.reset_peak_memory_stats(device)
        backward()
        torch.cuda.synchronize(device)
        # Weights that ComfyUI pages in and out do not come from torch's allocator.
        shares = [plan.resident, *[1.0] * len(denoiser.patchers[1:])]
        own = zip(denoiser.patchers, shares, strict=True)
        paged = sum(int(model.model_size() * share) for model, share in own if is_dynamic(model))
        beside = sum(held.model_loaded_memory() for held in others)
        return torch.cuda.max_memory_allocated(device) - beside + paged
    with LiveBytes() as live:
        backward()
    return live.most + sum(own.loaded_size() for own in denoiser.patchers) + 2 * adapters.values.nbytes


def is_dynamic(patcher) -> bool:
    """Whether ComfyUI pages this model's weights in and out by itself; versions before 0.16 never do."""
    return bool(getattr(patcher, "is_dynamic", bool)())


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage made inside, from when it is made until it is freed; `most` is the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        inputs = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs or {}))}
        # Here a tensor of another pack's own type is answered with a plain one, as without this mode.
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if id(storage) not in self._seen and id(storage) not in inputs:
                self._count(storage)
        return result

    def _count(self, storage) -> None:
        size, key = storage.nbytes(), id(storage)
        self._seen.add(key)
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


def _tensors(value: object) -> list[Tensor]:
    # Quantised tensors are wrappers around others and have no storage of their own.
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if type(leaf) in (Tensor, torch.nn.Parameter)]
