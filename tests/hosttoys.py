"""Real ComfyUI objects of the toy world's shapes with random weights, and batches to train them on."""

from __future__ import annotations

import hashlib

import comfy.model_base
import comfy.supported_models
import torch
from torch import Tensor

from lora_workbench.nodes.host.model import LoadedModel
from lora_workbench.training.batches import Batch
from lora_workbench.training.config import LoraConfig
from lora_workbench.training.lora import Adapters, Part
from lora_workbench.training.memory import EVERY_BLOCK, NO_BLOCK, MemoryPlan
from toyworld.node_pack import models, text, vae

KINDS = ("sdxl", "sdxl_vpred", "flux")
SIZE = (128, 96)


def model(kind: str, seed: int = 0, *, inference: bool = True, storage=None, compute=None):
    """A MODEL whose every weight is random, made in inference mode as ComfyUI's loaders make theirs.

    With `storage` and `compute` the weights are kept in one dtype and cast to the other when they are used.
    """
    with torch.inference_mode(inference):
        patcher = models.build(kind) if storage is None else stored(kind, storage, compute)
        random = torch.Generator().manual_seed(seed)
        for name, weight in patcher.model.diffusion_model.named_parameters():
            drawn = torch.randn(weight.shape, generator=random)
            with torch.no_grad():
                if weight.ndim > 1:
                    weight.copy_(drawn * weight[0].numel() ** -0.5)
                else:
                    weight.copy_(0.1 * drawn + (1.0 if name.endswith(("weight", "scale")) else 0.0))
        return patcher


def stored(kind: str, storage: torch.dtype, compute: torch.dtype | None):
    family, config = ("flux", models.TINY_FLUX) if kind == "flux" else ("sdxl", models.TINY_SDXL)
    settings = {"flux": comfy.supported_models.Flux, "sdxl": comfy.supported_models.SDXL}[family](dict(config))
    settings.set_inference_dtype(storage, compute)
    if kind == "flux":
        base = comfy.model_base.Flux(settings, device="cpu")
    else:
        kinds = comfy.model_base.ModelType
        model_type = kinds.V_PREDICTION if kind == "sdxl_vpred" else kinds.EPS
        base = comfy.model_base.SDXL(settings, model_type=model_type, device="cpu")
    cpu = torch.device("cpu")
    return models.PATCHER(base, load_device=cpu, offload_device=cpu)


def clip(kind: str, seed: int = 1):
    with torch.inference_mode():
        return (text.flux_clip if kind == "flux" else text.sdxl_clip)(seed=seed)


def autoencoder(patcher):
    with torch.inference_mode():
        latent_format = patcher.model.latent_format
        return vae.analytic_vae(latent_format.latent_channels, latent_format)


def loaded(patcher) -> LoadedModel:
    denoiser = LoadedModel(patcher)
    denoiser.load()
    return denoiser


def part(denoiser: LoadedModel) -> Part:
    """The network of a loaded model, as the Trainer adapts it."""
    return Part("lora_unet_", denoiser.network, denoiser.family.layers)


def attach(
    denoiser: LoadedModel, *, checkpointing: bool = False, rank: int = 3, alpha: float = 1.5, active: bool = True
):
    """Adapters on every layer of the largest preset; `active` ones already do something."""
    config = LoraConfig(rank=rank, alpha=alpha)
    adapters = Adapters.build([part(denoiser)], config, seed=0)
    if active:
        random = torch.Generator().manual_seed(9)
        with torch.no_grad():
            for adapter in adapters:
                adapter.up.copy_(torch.randn(adapter.up.shape, generator=random) * 0.1)
    denoiser.prepare(adapters, MemoryPlan(recompute=EVERY_BLOCK if checkpointing else NO_BLOCK))
    return adapters


def caption(kind: str, number: int = 0, tokens: int | None = None) -> dict[str, Tensor]:
    """The encoded text of a caption, of the shapes that ComfyUI's encoders give."""
    random = torch.Generator().manual_seed(100 + number)
    width, length = (text.WIDTH, 32) if kind == "flux" else (2 * text.WIDTH, 77)
    return {
        "cross_attn": torch.randn(tokens or length, width, generator=random),
        "pooled_output": torch.randn(text.WIDTH, generator=random),
    }


def at_inference(clip, prompt: str) -> dict[str, Tensor]:
    """What CLIPTextEncode gives."""
    with torch.inference_mode():
        ((cross_attn, extra),) = clip.encode_from_tokens_scheduled(clip.tokenize(prompt))
    return {"cross_attn": cross_attn[0], "pooled_output": extra["pooled_output"][0]}


def latents(kind: str, count: int = 2, size: tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    channels = 16 if kind == "flux" else 4
    return torch.randn(count, channels, size[1] // 8, size[0] // 8, generator=torch.Generator().manual_seed(seed))


def levels(kind: str, count: int = 2) -> Tensor:
    return torch.tensor([0.3, 0.8] if kind == "flux" else [0.7, 5.0])[:count]


class Batches:
    """An endless sequence of batches of two pictures with captions of their own, in two sizes."""

    def __init__(self, kind: str, sizes=(SIZE, (96, 128))) -> None:
        self.kind, self.sizes = kind, sizes

    def __getitem__(self, number: int) -> Batch:
        size = self.sizes[number % len(self.sizes)]
        text = (caption(self.kind, 2 * number), caption(self.kind, 2 * number + 1))
        return Batch(latents(self.kind, 2, size, number), text, size, ("a.png", "b.png"))


def digest(tensors: dict[str, Tensor]) -> str:
    """One hash over names, types and bits."""
    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        total.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes() if tensor.ndim else b"")
    return total.hexdigest()
