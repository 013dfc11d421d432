"""Which examples a step sees, loaded: a pure function of (seed, number), so that a run can go on from any step."""

import random
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .cache import Cached, read

KEPT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Batch:
    """Examples of one size: latents (B, C, h, w) in float32 on the CPU, and each example's own text."""

    latents: Tensor
    text: tuple[dict[str, Tensor], ...]
    size: tuple[int, int]  # (width, height) in pixels
    names: tuple[str, ...]


def load(chosen: Sequence[Cached], read: Callable[[Path], dict[str, Tensor]] = read) -> Batch:
    """Examples of one size as a batch, in their order; ValueError names a cache file that is gone or damaged."""
    return Batch(
        latents=torch.stack([read(cached.latents)["latents"] for cached in chosen]),
        text=tuple(dict(read(cached.text)) for cached in chosen),
        size=chosen[0].bucket,
        names=tuple(cached.example.path.name for cached in chosen),
    )


class Batches:
    """The endless sequence of batches: epochs, in each of which every example comes exactly `repeats` times.

    A batch holds one size, so the last one of each size may be short; none is dropped or filled up.
    """

    def __init__(self, cached: Sequence[Cached], batch_size: int, seed: int):
        if not cached:
            raise ValueError("There is no picture to train on: add pictures to the folder or hold fewer out.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self._batch_size, self._seed = batch_size, seed
        self._groups = _by_bucket(cached)
        self._read = _Memory(read, KEPT_BYTES)
        self._epoch = lru_cache(maxsize=2)(self._planned)
        self.steps_per_epoch = sum(-(-len(group) // batch_size) for group in self._groups)

    def __getitem__(self, number: int) -> Batch:
        """Batch `number`, counted from 0 over all epochs; ValueError names a cache file that is gone or damaged."""
        if number < 0:
            raise IndexError(f"batches are counted from 0, got {number}")
        epoch, position = divmod(number, self.steps_per_epoch)
        return load(self._epoch(epoch)[position], self._read)

    def _planned(self, epoch: int) -> list[list[Cached]]:
        order = random.Random(f"{self._seed} {epoch}")
        batches = []
        for group in self._groups:
            shuffled = order.sample(group, len(group))
            batches += [shuffled[i : i + self._batch_size] for i in range(0, len(shuffled), self._batch_size)]
        order.shuffle(batches)
        return batches


def _by_bucket(cached: Sequence[Cached]) -> list[list[Cached]]:
    """The examples of each size, each as often as it is repeated."""
    groups = defaultdict(list)
    for item in cached:
        groups[item.bucket] += [item] * item.example.repeats
    return list(groups.values())


class _Memory:
    """`read` that remembers the files used last, up to `capacity` bytes of tensors."""

    def __init__(self, read: Callable[[Path], dict[str, Tensor]], capacity: int):
        self._read, self._capacity, self._size = read, capacity, 0
        self._files: OrderedDict[Path, dict[str, Tensor]] = OrderedDict()

    def __call__(self, path: Path) -> dict[str, Tensor]:
        if path in self._files:
            self._files.move_to_end(path)
            return self._files[path]
        tensors = self._files[path] = self._read(path)
        self._size += _size(tensors)
        while self._size > self._capacity:
            self._size -= _size(self._files.popitem(last=False)[1])
        return tensors


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(value.nbytes for value in tensors.values())
