"""What ComfyUI feeds a network beside the picture, made the way its samplers make it."""

from __future__ import annotations

from collections.abc import Sequence

import comfy.model_base
import torch
from torch import Tensor


def conditions_of(
    base, noisy: Tensor, text: Sequence[dict[str, Tensor]], size: tuple[int, int], guidance: float | None
) -> dict[str, Tensor]:
    """The network's further arguments for noisy latents (B, C, h, w), made for each sample on its own and then stacked.

    Sizes are the bucket's with no crop, which is what ComfyUI feeds at inference when nothing else is said.
    """
    width, height = size
    extra = {} if guidance is None else {"guidance": guidance}
    samples = []
    for entry in text:
        conditions = base.extra_conds(
            **{name: tensor[None].to(noisy.device) for name, tensor in entry.items()},
            noise=noisy[:1],
            latent_image=noisy[:1],
            device=noisy.device,
            prompt_type="positive",
            width=width,
            height=height,
            **extra,
        )
        samples.append({k: v.process_cond(batch_size=1, area=None).cond for k, v in conditions.items()})
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


def cast(value: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A condition as the network takes it: numbers in its dtype, indices as they are."""
    return comfy.model_base.convert_tensor(value, dtype, device)
