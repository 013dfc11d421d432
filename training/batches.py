"""Which examples a step sees, loaded: a pure function of (seed, number), so that a run can go on from any step."""

import random
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .augmentation import variant_of
from .cache import Cached, read
from .dataset import REGULARIZATION
from .wording import text_of

KEPT_BYTES = 256 * 2**20


@dataclass(frozen=True)
class Batch:
    """Examples of one size: latents (B, C, h, w) in float32 on the CPU, and each example's own text.

    `weights` (B,) are factors on the loss of each example, all 1 unless given. `masks` (B, 1, h, w) say from 0 to 1
    what of each example counts; None when all of it does. `captions` are the texts as drawn. `class_captions` and
    `class_text` are the same with class words for the trigger word, "" and None for examples that have no such text;
    `class_text` is None when the dataset was encoded without.
    """

    latents: Tensor
    text: tuple[dict[str, Tensor], ...]
    size: tuple[int, int]  # (width, height) in pixels
    names: tuple[str, ...]
    weights: Tensor | None = None
    masks: Tensor | None = None
    captions: tuple[str, ...] = ()
    class_captions: tuple[str, ...] = ()
    class_text: tuple[dict[str, Tensor] | None, ...] | None = None

    def __post_init__(self) -> None:
        if self.weights is None:
            object.__setattr__(self, "weights", torch.ones(len(self.latents)))

    def at(self, places: Sequence[int]) -> "Batch":
        """The examples at some places only, in that order."""
        chosen = list(places)

        def some(values: tuple | None) -> tuple | None:
            return tuple(values[place] for place in chosen) if values else values

        return replace(
            self,
            latents=self.latents[chosen],
            text=some(self.text),
            names=some(self.names),
            weights=self.weights[chosen],
            masks=None if self.masks is None else self.masks[chosen],
            captions=some(self.captions),
            class_captions=some(self.class_captions),
            class_text=some(self.class_text),
        )

    def of_class(self) -> "Batch":
        """The same examples, told with class words for the trigger word; all of them must have such a text."""
        return replace(self, text=self.class_text, captions=self.class_captions, class_captions=(), class_text=None)


def load(chosen: Sequence[Cached], read: Callable[[Path], dict[str, Tensor]] = read) -> Batch:
    """Plain examples of one size as a batch, in their order; ValueError names a cache file that is gone or damaged."""
    latents = torch.stack([read(cached.latents)["latents"] for cached in chosen])
    return Batch(
        latents=latents,
        text=tuple(dict(read(cached.text)) for cached in chosen),
        size=chosen[0].bucket,
        names=tuple(cached.example.path.name for cached in chosen),
        weights=torch.tensor([cached.example.weight for cached in chosen], dtype=torch.float32),
        masks=_masks(chosen, latents, read),
        captions=tuple(cached.caption for cached in chosen),
        **_class_texts(chosen, read),
    )


class Batches:
    """The endless sequence of batches: epochs, in each of which every example comes exactly `repeats` times.

    An example that is trained at several sizes comes that often at each of them, as if it were several pictures. Its
    variants do not add to that: they take turns, each time it comes, over the epochs. Which of its texts it comes with
    is drawn anew each time. A batch holds one size, so the last one of each size may be short; none is dropped or
    filled up. Of more regularization examples than others, an epoch shows as many as of the others, in turns.
    """

    def __init__(self, cached: Sequence[Cached], batch_size: int, seed: int):
        if not cached:
            raise ValueError("There is no picture to train on: add pictures to the folder or hold fewer out.")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self._batch_size, self._seed = batch_size, seed
        self._groups = _by_bucket(cached)
        roles = Counter(_is_regularization(item) for group in self._groups for item in group)
        self._own, self._others = roles[False], roles[True]
        self._read = _Memory(read, KEPT_BYTES)
        self._epoch = lru_cache(maxsize=2)(self._planned)
        self.steps_per_epoch = sum(-(-len(self._shown(group, 0)) // batch_size) for group in self._groups)

    def __getitem__(self, number: int) -> Batch:
        """Batch `number`, counted from 0 over all epochs; ValueError names a cache file that is gone or damaged."""
        if number < 0:
            raise IndexError(f"batches are counted from 0, got {number}")
        epoch, position = divmod(number, self.steps_per_epoch)
        drawn = [
            self._drawn(cached, epoch * cached.example.repeats + repetition, number, place)
            for place, (cached, repetition) in enumerate(self._epoch(epoch)[position])
        ]
        return load(drawn, self._read)

    def _drawn(self, cached: Cached, turn: int, number: int, place: int) -> Cached:
        """The example as it comes for the time that is counted `turn`, at `place` in batch `number`."""
        seen = ((cached.latents, cached.mask), *cached.variants)
        latents, mask = seen[variant_of(len(seen), self._seed, turn, cached.latents.name)]
        text = text_of(cached.example, cached.wording, self._seed, number, place)
        if not cached.texts:
            return replace(cached, latents=latents, mask=mask)
        return replace(cached, latents=latents, mask=mask, caption=text, text=cached.texts[text])

    def _planned(self, epoch: int) -> list[list[tuple[Cached, int]]]:
        order = random.Random(f"{self._seed} {epoch}")
        batches = []
        for group in self._groups:
            shown = self._shown(group, epoch)
            shuffled = order.sample(shown, len(shown))
            batches += [shuffled[i : i + self._batch_size] for i in range(0, len(shuffled), self._batch_size)]
        order.shuffle(batches)
        return batches

    def _shown(self, group: list[tuple[Cached, int]], epoch: int) -> list[tuple[Cached, int]]:
        """What an epoch shows of the examples of one size: as many in each."""
        turns = [item for item in group if _is_regularization(item)]
        count = in_turns(len(turns), self._own, self._others)
        if count == len(turns):
            return group
        turns = random.Random(f"{self._seed} turns").sample(turns, len(turns))
        own = [item for item in group if not _is_regularization(item)]
        return own + [turns[(epoch * count + place) % len(turns)] for place in range(count)]


def in_turns(count: int, own: int, others: int) -> int:
    """How many of `count` regularization examples of a size an epoch shows, where there are `others` in all."""
    return count if others <= own else -(-count * own // others)


def _is_regularization(item: tuple[Cached, int]) -> bool:
    return item[0].example.role == REGULARIZATION


def largest(cached: Sequence[Cached], batch_size: int) -> Batch:
    """The batch that takes most: the most pixels there can be in one, texts that are asked about twice, long ones."""

    def pixels(group: list[tuple[Cached, int]]) -> int:
        width, height = group[0][0].bucket
        return min(batch_size, len(group)) * width * height

    def cost(item: Cached) -> tuple[bool, int]:
        return item.caption in (item.class_texts or ()), item.text.stat().st_size

    group = [item for item, _ in max(_by_bucket(cached), key=pixels)]
    return load(sorted(group, key=cost, reverse=True)[:batch_size])


def _by_bucket(cached: Sequence[Cached]) -> list[list[tuple[Cached, int]]]:
    """The examples of each size, each as often as it is repeated, with the number of the repetition."""
    groups = defaultdict(list)
    for item in cached:
        groups[item.bucket] += [(item, repetition) for repetition in range(item.example.repeats)]
    return list(groups.values())


def _masks(chosen: Sequence[Cached], latents: Tensor, read: Callable[[Path], dict[str, Tensor]]) -> Tensor | None:
    """The masks, all of the picture for examples without one; None when no example has one."""
    if not any(cached.mask for cached in chosen):
        return None
    whole = torch.ones_like(latents[0, :1])
    return torch.stack([read(cached.mask)["mask"] if cached.mask else whole for cached in chosen])


def _class_texts(chosen: Sequence[Cached], read: Callable[[Path], dict[str, Tensor]]) -> dict[str, tuple]:
    """The captions with class words and their texts, as in `Batch`; nothing when they were not encoded."""
    if any(cached.class_texts is None for cached in chosen):
        return {}
    told = [cached.class_texts.get(cached.caption) for cached in chosen]
    return {
        "class_captions": tuple(caption_and_file[0] if caption_and_file else "" for caption_and_file in told),
        "class_text": tuple(dict(read(caption_and_file[1])) if caption_and_file else None for caption_and_file in told),
    }


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
