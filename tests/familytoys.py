"""Tiny models of every kind that ComfyUI has a network for, out of its own classes, with random weights.

They are made as `hosttoys` makes SDXL and FLUX: in inference mode, every weight drawn. A kind names its text's width,
its latents and what else its text encoder says.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import comfy.model_management as mm
import comfy.sampler_helpers
import comfy.samplers
import comfy.supported_models
import torch
from torch import Tensor

from lora_workbench.nodes.host.conditions import UNBATCHED
from lora_workbench.training.batches import Batch
from toyworld.node_pack import models

SIZE = (64, 64)
UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "model_channels": 32,
    "channel_mult": [1, 1],
    "num_res_blocks": [1, 1],
    "transformer_depth": [0, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 1, 1],
    "context_dim": 768,
    "use_linear_in_transformer": False,
    "adm_in_channels": None,
    "num_heads": 2,
    "num_head_channels": -1,
}
FULL_UNET = {
    **UNET,
    "model_channels": 320,
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "num_heads": 8,
}
FLUX_LIKE = {
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "hidden_size": 48,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 2,
    "axes_dim": [8, 8, 8],
    "theta": 10000,
    "qkv_bias": True,
    "context_in_dim": 40,
    "vec_in_dim": None,
}
SD3_LIKE = {
    "in_channels": 16,
    "patch_size": 2,
    "depth": 2,
    "input_size": None,
    "adm_in_channels": 24,
    "num_patches": 16 * 16,
    "pos_embed_max_size": 16,
    "pos_embed_scaling_factor": None,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 40, "out_features": 128}},
}
NEXT_DIT = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 48,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 1,
    "multiple_of": 16,
    "ffn_dim_multiplier": 1.0,
    "qk_norm": True,
    "cap_feat_dim": 40,
    "axes_dims": [8, 8, 8],
    "axes_lens": [64, 64, 64],
}


@dataclass(frozen=True)
class Kind:
    """One tiny model: its class in `comfy.supported_models`, and the shapes of what it takes."""

    settings: str
    config: dict
    text: int
    channels: int = 16
    pooled: int = 0
    downscale: int = 8
    flow: bool = True
    size: tuple[int, int] = SIZE
    extra: dict = field(default_factory=dict)
    """What else its text encoder says: name -> numbers."""


KINDS = {
    "sd15": Kind("SD15", UNET, 768, channels=4, flow=False),
    "sd3": Kind("SD3", SD3_LIKE, 40, pooled=24),
    "sd35": Kind("SD3", {**SD3_LIKE, "qk_norm": "rms", "x_block_self_attn_layers": [0]}, 40, pooled=24),
    "chroma": Kind(
        "Chroma",
        {
            "image_model": "chroma",
            **FLUX_LIKE,
            "in_channels": 64,
            "out_channels": 64,
            "txt_ids_dims": [],
            "in_dim": 64,
            "out_dim": 48,
            "hidden_dim": 32,
            "n_layers": 2,
        },
        40,
    ),
    "lumina2": Kind("Lumina2", {**NEXT_DIT, "rope_theta": 10000.0}, 40, extra={"attention_mask": [1] * 6}),
    "z_image": Kind(
        "Lumina2",
        {
            **NEXT_DIT,
            "dim": 256,
            "n_heads": 4,
            "n_kv_heads": 4,
            "axes_dims": [16, 24, 24],
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 8,
        },
        40,
    ),
    "qwen_image": Kind(
        "QwenImage",
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "num_layers": 2,
            "attention_head_dim": 24,
            "num_attention_heads": 2,
            "joint_attention_dim": 40,
            "axes_dims_rope": (8, 8, 8),
        },
        40,
        extra={"attention_mask": [1, 1, 1, 1, 0, 0]},
    ),
    "flux2": Kind(
        "Flux2",
        {
            "image_model": "flux2",
            **FLUX_LIKE,
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
            "axes_dim": [6, 6, 6, 6],
            "txt_ids_dims": [3],
            "guidance_embed": True,
            "global_modulation": True,
            "mlp_silu_act": True,
            "qkv_bias": False,
            "ops_bias": False,
        },
        40,
        channels=128,
        downscale=16,
    ),
    "hidream": Kind(
        "HiDream",
        {
            "image_model": "hidream",
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 24,
            "num_attention_heads": 2,
            "caption_channels": [40, 32],
            "text_emb_dim": 24,
            "num_routed_experts": 2,
            "num_activated_experts": 1,
            "axes_dims_rope": (8, 8, 8),
            "max_resolution": (16, 16),
            "llama_layers": [0, 1],
        },
        40,
        pooled=24,
        extra={"conditioning_llama3": [[[0.01 * (i * j % 17) - 0.05 for i in range(32)] for j in range(5)]] * 2},
    ),
    "aura_flow": Kind(
        "AuraFlow",
        {
            "cond_seq_dim": 40,
            "dim": 64,
            "n_layers": 2,
            "n_double_layers": 1,
            "n_heads": 2,
            "global_conddim": 48,
            "max_seq": 256,
        },
        40,
        channels=4,
    ),
    "pixart": Kind(
        "PixArtSigma",
        {
            "image_model": "pixart_sigma",
            "input_size": 16,
            "hidden_size": 48,
            "depth": 2,
            "num_heads": 2,
            "caption_channels": 40,
            "pe_interpolation": 1,
            "micro_condition": False,
        },
        40,
        channels=4,
        flow=False,
        size=(320, 320),
    ),
    "hunyuan_image": Kind(
        "HunyuanImage21",
        {
            "image_model": "hunyuan_video",
            **FLUX_LIKE,
            "in_channels": 64,
            "out_channels": 64,
            "patch_size": [1, 1],
            "hidden_size": 48,
            "axes_dim": [12, 12],
            "guidance_embed": True,
            "byt5": False,
            "meanflow": False,
            "use_cond_type_embedding": False,
            "vision_in_dim": None,
            "meanflow_sum": False,
        },
        40,
        channels=64,
        downscale=32,
    ),
}
KERNELS_WITHOUT_GRADIENT = {
    "anima": Kind(
        "Anima",
        {
            "image_model": "anima",
            "max_img_h": 24,
            "max_img_w": 24,
            "max_frames": 4,
            "in_channels": 16,
            "out_channels": 16,
            "patch_spatial": 2,
            "patch_temporal": 1,
            "model_channels": 64,
            "num_blocks": 2,
            "num_heads": 2,
            "crossattn_emb_channels": 1024,
            "pos_emb_cls": "rope3d",
            "pos_emb_learnable": True,
            "use_adaln_lora": True,
            "adaln_lora_dim": 16,
        },
        1024,
        extra={"t5xxl_ids": [3, 5, 7, 1], "t5xxl_weights": [1.0, 1.0, 1.0, 1.0]},
    ),
}
"""What some versions of ComfyUI cannot differentiate."""
ALL = {**KINDS, **KERNELS_WITHOUT_GRADIENT}
KINDS = {name: kind for name, kind in KINDS.items() if hasattr(comfy.supported_models, kind.settings)}


def model(name: str, seed: int = 0, *, inference: bool = True):
    """A MODEL of a kind; with `inference` off its weights are ordinary tensors, which plain autograd may keep."""
    kind = ALL[name]
    cpu = torch.device("cpu")
    with torch.inference_mode(inference):
        settings = getattr(comfy.supported_models, kind.settings)(dict(kind.config))
        settings.unet_config = dict(kind.config)  # without what real checkpoints of the family have in common
        settings.set_inference_dtype(torch.float32, None)
        base = settings.get_model({}, device=cpu)
        base.diffusion_model.requires_grad_(False)
        _draw(base.diffusion_model, seed)
        return models.PATCHER(base, load_device=cpu, offload_device=cpu)


@torch.no_grad()
def _draw(network: torch.nn.Module, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    for name, weight in [*network.named_parameters(), *network.named_buffers()]:
        if not weight.is_floating_point() or "inv_freq" in name:
            continue
        drawn = torch.randn(weight.shape, generator=random)
        if weight.ndim > 1:
            weight.copy_(drawn * weight[0].numel() ** -0.5)
        else:
            weight.copy_(0.1 * drawn + (1.0 if name.endswith(("weight", "scale")) else 0.0))


def caption(name: str, number: int = 0, tokens: int = 6) -> dict[str, Tensor]:
    """The encoded text of a caption."""
    kind, random = ALL[name], torch.Generator().manual_seed(100 + number)
    entry = {"cross_attn": torch.randn(tokens, kind.text, generator=random)}
    if kind.pooled:
        entry["pooled_output"] = torch.randn(kind.pooled, generator=random)
    entry |= {key: torch.tensor(numbers) for key, numbers in kind.extra.items()}
    return entry


def latents(name: str, count: int = 2, seed: int = 0) -> Tensor:
    """Latents (B, C, h, w) in the kind's own latent space."""
    kind = ALL[name]
    width, height = (side // kind.downscale for side in kind.size)
    return torch.randn(count, kind.channels, height, width, generator=torch.Generator().manual_seed(seed))


def levels(name: str, count: int = 2) -> Tensor:
    return torch.tensor([0.3, 0.8] if ALL[name].flow else [0.7, 5.0])[:count]


class Batches:
    """An endless sequence of batches of two pictures with captions of their own."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, number: int) -> Batch:
        text = (caption(self.name, 2 * number), caption(self.name, 2 * number + 1))
        return Batch(latents(self.name, 2, number), text, KINDS[self.name].size, ("a.png", "b.png"))


def condition(name: str, entry: dict[str, Tensor], guidance: float | None) -> list:
    """A caption as the sampler gets it from CLIPTextEncode."""
    extra = {key: value if key in UNBATCHED else value[None] for key, value in entry.items() if key != "cross_attn"}
    return [
        entry["cross_attn"][None],
        {"pooled_output": None, **extra, **({} if guidance is None else {"guidance": guidance})},
    ]


def denoised_by_comfyui(patcher, name: str, noisy: Tensor, sigma: Tensor, entry, guidance: float | None) -> Tensor:
    """What ComfyUI's samplers make of noisy latents (1, C, h, w)."""
    mm.load_models_gpu([patcher])
    frame = patcher.model.latent_format.latent_dimensions == 3
    noisy = noisy.unsqueeze(2) if frame else noisy
    positive = comfy.sampler_helpers.convert_cond([condition(name, entry, guidance)])
    with torch.inference_mode():
        patcher.pre_run()
        conditions = comfy.samplers.process_conds(
            patcher.model, noisy, {"positive": positive}, noisy.device, latent_image=noisy
        )["positive"]
        (answer,) = comfy.samplers.calc_cond_batch(patcher.model, [conditions], noisy, sigma, patcher.model_options)
        patcher.cleanup()
    return (answer.squeeze(2) if frame else answer).clone()
