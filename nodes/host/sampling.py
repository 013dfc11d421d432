"""Pictures made exactly as the KSampler node makes them, without its side effects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import comfy.model_management as mm
import comfy.sample
import comfy.samplers
import torch
from torch import Tensor

from ...training.families import Family

PREVIEW_STEPS = 20


@dataclass(frozen=True)
class SamplerSettings:
    """The widgets of KSampler, and the size of the picture."""

    width: int
    height: int
    seed: int
    cfg: float
    sampler: str
    scheduler: str
    steps: int = PREVIEW_STEPS

    @classmethod
    def square(cls, family: Family, side: int, seed: int) -> SamplerSettings:
        """Those that suit a family, for a picture of the largest size up to `side` that latents can have."""
        side = side // 8 * 8
        return cls(side, side, seed, family.cfg, family.sampler, family.scheduler)


def encode_prompt(clip, prompt: str) -> list:
    """CONDITIONING of a prompt, as CLIPTextEncode gives it."""
    with torch.inference_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def sample_picture(model, vae, positive: list, negative: list, settings: SamplerSettings) -> Tensor:
    """One picture (H, W, 3), equal to EmptyLatentImage -> KSampler -> VAEDecode pixel for pixel.

    No progress is drawn, since it would land on the node that asks, and the global random state is left as it was.
    """
    with torch.inference_mode(), _random_state_kept(model.load_device):
        shape = (1, 4, settings.height // 8, settings.width // 8)
        empty = torch.zeros(shape, device=mm.intermediate_device(), dtype=_latent_dtype())
        latent = comfy.sample.fix_empty_latent_channels(model, empty, 8)
        samples = comfy.sample.sample(
            model,
            comfy.sample.prepare_noise(latent, settings.seed),
            settings.steps,
            settings.cfg,
            settings.sampler,
            settings.scheduler,
            positive,
            negative,
            latent,
            disable_pbar=True,
            seed=settings.seed,
        )
        picture = vae.decode(samples)
        return picture.reshape(-1, *picture.shape[-3:])[0].cpu()


def _latent_dtype() -> torch.dtype:
    """What EmptyLatentImage uses; ComfyUI before 0.16 always used float32."""
    return mm.intermediate_dtype() if hasattr(mm, "intermediate_dtype") else torch.float32


@contextmanager
def _random_state_kept(device: torch.device) -> Iterator[None]:
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        yield


def sampler_names() -> list[str]:
    """The samplers of KSampler."""
    return list(comfy.samplers.KSampler.SAMPLERS)


def scheduler_names() -> list[str]:
    """The schedulers of KSampler."""
    return list(comfy.samplers.KSampler.SCHEDULERS)
