"""Tiny pretrained SDXL and FLUX models out of ComfyUI's own classes, and larger random ones for benchmarks."""

from pathlib import Path

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import safetensors.torch
import torch

from . import text, vae

WEIGHTS = Path(__file__).resolve().parent / "weights"
KINDS = ("sdxl", "sdxl_vpred", "flux")
PATCHER = getattr(comfy.model_patcher, "CoreModelPatcher", comfy.model_patcher.ModelPatcher)

SDXL = {
    "use_checkpoint": False,
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "use_spatial_transformer": True,
    "legacy": False,
    "num_classes": "sequential",
    "use_linear_in_transformer": True,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
TINY_SDXL = {
    **SDXL,
    # Group norms have 32 groups. With one channel a group they would take all scale and colour out of the picture.
    "model_channels": 64,
    "channel_mult": [1, 1],
    "num_res_blocks": [1, 1],
    "transformer_depth": [0, 2],
    "transformer_depth_middle": 2,
    "transformer_depth_output": [0, 0, 2, 2],
    "context_dim": 2 * text.WIDTH,
    "adm_in_channels": text.WIDTH + 6 * 256,
}
FULL_SDXL = {
    **SDXL,
    "model_channels": 320,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 2],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10,
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "context_dim": 2048,
    "adm_in_channels": 2816,
}
MID_SDXL = {**FULL_SDXL, "model_channels": 64, "context_dim": 408, "adm_in_channels": 256 + 6 * 256}  # a fifth as wide

FLUX = {
    "image_model": "flux",
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "mlp_ratio": 4.0,
    "theta": 10000,
    "qkv_bias": True,
    "txt_ids_dims": [],
    "guidance_embed": True,
}
TINY_FLUX = {
    **FLUX,
    "hidden_size": 96,
    "num_heads": 3,
    "axes_dim": [8, 12, 12],
    "depth": 2,
    "depth_single_blocks": 3,
    "context_in_dim": text.WIDTH,
    "vec_in_dim": text.WIDTH,
}
FULL_FLUX = {
    **FLUX,
    "hidden_size": 3072,
    "num_heads": 24,
    "axes_dim": [16, 56, 56],
    "depth": 19,
    "depth_single_blocks": 38,
    "context_in_dim": 4096,
    "vec_in_dim": 768,
}
MID_FLUX = {**FULL_FLUX, "hidden_size": 256, "num_heads": 2}


def load(kind: str) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of a toy base: ``kind`` is "sdxl", "sdxl_vpred" or "flux"."""
    if kind not in KINDS:
        raise ValueError(f"There is no toy model {kind!r}; choose one of {', '.join(KINDS)}.")
    model = load_model(kind)
    make_clip = text.flux_clip if kind == "flux" else text.sdxl_clip
    latent_format = model.model.latent_format
    return model, make_clip(seed=1), vae.analytic_vae(latent_format.latent_channels, latent_format)


def load_model(kind: str, **_) -> comfy.model_patcher.ModelPatcher:
    """The MODEL alone, as ComfyUI calls it when it wants a second copy."""
    model = build(kind)
    model.model.diffusion_model.load_state_dict(read_weights(kind))
    model.cached_patcher_init = (load_model, (kind,))
    return model


def read_weights(kind: str) -> dict[str, torch.Tensor]:
    """The committed tensors of a toy base, in float32; the v-prediction file holds only what differs from SDXL's."""
    stored = safetensors.torch.load_file(WEIGHTS / f"{kind}.safetensors")
    if kind == "sdxl_vpred":
        stored = {**safetensors.torch.load_file(WEIGHTS / "sdxl.safetensors"), **stored}
    return {name: tensor.float() for name, tensor in stored.items()}


def build(kind: str) -> comfy.model_patcher.ModelPatcher:
    """A toy MODEL whose weights are not yet set."""
    model_type = comfy.model_base.ModelType.V_PREDICTION if kind == "sdxl_vpred" else comfy.model_base.ModelType.EPS
    if kind == "flux":
        return _patcher("flux", TINY_FLUX, torch.float32)
    return _patcher("sdxl", TINY_SDXL, torch.float32, model_type)


def mid_size(family: str, seed: int = 0) -> comfy.model_patcher.ModelPatcher:
    """Random weights in full depth and reduced width, about 100 M parameters; ``family`` is "sdxl" or "flux"."""
    model = _patcher(family, {"sdxl": MID_SDXL, "flux": MID_FLUX}[family], torch.float32)
    _randomise(model.model.diffusion_model, seed)
    return model


def full_size(
    family: str, device: str, dtype: torch.dtype, compute: torch.dtype | None = None, seed: int = 0, **changes: int
) -> comfy.model_patcher.ModelPatcher:
    """Random weights at the real size, made on ``device``; ``family`` is "sdxl" or "flux".

    Kept as ``dtype`` and, where that is not what is computed with, cast to ``compute`` when they are used. ``changes``
    replace entries of its configuration, such as the number of blocks.
    """
    config = {**{"sdxl": FULL_SDXL, "flux": FULL_FLUX}[family], **changes}
    model = _patcher(family, config, dtype, device=torch.device(device), compute=compute)
    _randomise(model.model.diffusion_model, seed)
    return model


def _patcher(family, unet_config, dtype, model_type=comfy.model_base.ModelType.EPS, device=None, compute=None):
    offload = comfy.model_management.unet_offload_device()
    classes = {"sdxl": comfy.supported_models.SDXL, "flux": comfy.supported_models.Flux}
    config = classes[family](dict(unet_config))
    config.set_inference_dtype(dtype, compute)
    if family == "flux":
        model = comfy.model_base.Flux(config, device=device or offload)
    else:
        model = comfy.model_base.SDXL(config, model_type=model_type, device=device or offload)
    return PATCHER(model, load_device=comfy.model_management.get_torch_device(), offload_device=offload)


def _randomise(module: torch.nn.Module, seed: int) -> None:
    """Fill weights so that activations keep their size: matrices by fan-in, norms with ones, biases with zeros."""
    device = next(module.parameters()).device
    random = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim > 1:
                drawn = torch.empty(weight.shape, dtype=torch.float32, device=device)
                weight.copy_(drawn.normal_(0.0, weight[0].numel() ** -0.5, generator=random))
            else:
                weight.fill_(1.0 if name.endswith(("weight", "scale")) else 0.0)
