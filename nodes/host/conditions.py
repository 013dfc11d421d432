"""What ComfyUI feeds a network beside the picture, made the way its samplers make it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

UNBATCHED = ("t5xxl_ids", "t5xxl_weights")
"""What some text encoders say beside the text without the dimension of a batch."""
Conditions = dict[str, object]
"""The further arguments of a network for one picture: tensors with a batch of one, and plain values."""


def conditions_of(
    base, noisy: Tensor, entry: Mapping[str, Tensor], size: tuple[int, int], guidance: float | None
) -> Conditions:
    """The conditions of one picture of the noisy latents' shape, from its encoded text.

    Sizes are the bucket's with no crop, which is what ComfyUI feeds at inference when nothing else is said.
    """
    width, height = size
    told = {name: (tensor if name in UNBATCHED else tensor[None]).to(noisy.device) for name, tensor in entry.items()}
    conditions = base.extra_conds(
        # Text encoders without a pooled text say so by None, and some models ask for it.
        **{"pooled_output": None, **told},
        noise=noisy[:1],
        latent_image=noisy[:1],
        device=noisy.device,
        prompt_type="positive",
        width=width,
        height=height,
        **({} if guidance is None else {"guidance": guidance}),
    )
    return {name: value.process_cond(batch_size=1, area=None).cond for name, value in conditions.items()}


def groups(samples: Sequence[Conditions]) -> Iterator[tuple[list[int], Conditions]]:
    """Which pictures can go through the network together, and their conditions as one batch.

    Texts of different length go through in turn, since padding would change what they say; so do pictures of which the
    network is told different plain values.
    """
    alike: dict[tuple, list[int]] = {}
    for number, sample in enumerate(samples):
        alike.setdefault(tuple((name, _shape(value)) for name, value in sample.items()), []).append(number)
    for members in alike.values():
        yield members, {name: _stacked([samples[n][name] for n in members]) for name in samples[members[0]]}


def _shape(value: object) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    return tuple(map(_shape, value)) if isinstance(value, list) else repr(value)


def _stacked(values: list) -> object:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values)
    return [_stacked(list(parts)) for parts in zip(*values, strict=True)] if isinstance(first, list) else first
