"""What a MODEL is: its family, or the sentence that says why it cannot be trained."""

from __future__ import annotations

import inspect
import sys

import comfy.model_base
import torch

from ...training import families
from ...training.families import Family, family_by_structure
from .prediction import prediction_of

_PICTURE_FROM_PICTURE = "answers with a picture made from another picture, and a dataset has only one of each"
_NO_PICTURES = "does not make pictures"

# Classes of ComfyUI (and all that inherit from them) that sample and still cannot learn from pictures and captions.
REFUSED = {
    "SDXLRefiner": "only finishes pictures that another model began, so load the SDXL base model instead",
    "StableCascade_C": "is one half of a pair of networks and works on pictures 42 times smaller",
    "StableCascade_B": "is the second half of a pair of networks",
    "SVD_img2vid": "makes videos out of pictures",
    "SD21UNCLIP": _PICTURE_FROM_PICTURE,
    "Stable_Zero123": _PICTURE_FROM_PICTURE,
    "SD_X4Upscaler": _PICTURE_FROM_PICTURE,
    "IP2P": _PICTURE_FROM_PICTURE,
    "Lotus": _PICTURE_FROM_PICTURE,
    "SeedVR2": _PICTURE_FROM_PICTURE,
    "PiD": _PICTURE_FROM_PICTURE,
    "HunyuanImage21Refiner": _PICTURE_FROM_PICTURE,
    "ACEStep": _NO_PICTURES,
    "Trellis2": _NO_PICTURES,
    "TripoSplat": _NO_PICTURES,
    "RT_DETR_v4": _NO_PICTURES,
    "DepthAnything3": _NO_PICTURES,
    "SAM3": _NO_PICTURES,
}

# Kernels that these call in training too, and that have no backward; other versions of ComfyUI do without.
KERNELS = {"Anima": "rms_rope_split_half", "JoyImage": "rms_rope", "ErnieImage": "apply_rope_split_half"}

SINGLE_FRAMES = ("QwenImage", "Anima", "Krea2", "JoyImage")
"""Image models whose latents have the shape of a video of one frame."""

# What other tools call a model that is trained by its structure: title, name of the base, architecture, cfg at which
# it samples. A model that nobody named is called by ComfyUI's name for it.
NAMES = {
    "QwenImage": ("Qwen-Image", "qwen_image", "Qwen-Image", 4.0),
    "Lumina2": ("Lumina 2", "lumina2", "lumina-2", 4.0),
    "HunyuanImage21": ("Hunyuan Image 2.1", "hunyuan_image_2.1", "hunyuan-image-2.1", 3.5),
    "HunyuanDiT": ("Hunyuan-DiT", "hunyuan_dit", "hunyuan-dit-g2-v1_2", 6.0),
    "HiDream": ("HiDream", "hidream", "hidream-i1", 5.0),
    "AuraFlow": ("AuraFlow", "auraflow", "auraflow", 3.5),
    "PixArt": ("PixArt", "pixart", "pixart", 4.5),
    "Flux2": ("FLUX.2", "flux2", "Flux.2-dev", 1.0),
    "Kandinsky5Image": ("Kandinsky 5 Image", "kandinsky5_image", "Kandinsky-5", 5.0),
    "Omnigen2": ("OmniGen2", "omnigen2", "omnigen2", 5.0),
    "Anima": ("Anima", "anima", "anima-preview", 4.0),
}
Z_IMAGE = ("Z-Image", "z_image", "Z-Image", 4.0)
Z_IMAGE_WIDTH = 3840


def family_of(model) -> Family:
    """The family of a MODEL; ValueError saying why when it cannot be trained."""
    base = model.model
    kind = type(base).__name__
    for ancestor in type(base).__mro__:
        if ancestor.__name__ in REFUSED:
            raise ValueError(f"This MODEL is a {kind}, which {REFUSED[ancestor.__name__]}, so it cannot be trained.")
    _check_latents(base, kind)
    if KERNELS.get(kind, "") and _calls(base.diffusion_model, KERNELS[kind]):
        raise ValueError(
            f"This MODEL is a {kind}, which this version of ComfyUI computes with a kernel that has no gradient: "
            "load another model, or use another version of ComfyUI."
        )
    known = _known(base)
    family = known or _by_structure(base, kind)
    # Where a family has no row, its configuration may count channels in its own way.
    if (known and _has_more_inputs(base)) or _takes_a_second_picture(base):
        raise ValueError(
            f"This {family.title} MODEL is an inpainting, editing or control variant, which takes a second picture: "
            "load the plain model to train on."
        )
    prediction_of(model)
    return family


def _check_latents(base, kind: str) -> None:
    """ValueError when what the network works on is not the latent of one picture."""
    latents = base.latent_format
    if latents.latent_dimensions == 3 and not is_single_frame(base):
        raise ValueError(f"This MODEL is a {kind}, a video model, and only image models can be trained: load one.")
    if latents.latent_dimensions == 1:
        raise ValueError(f"This MODEL is a {kind}, which {_NO_PICTURES}: load an image model to train on.")
    if latents.spacial_downscale_ratio < 8:
        raise ValueError(
            f"This MODEL is a {kind}, which works on pixels where others work on the latents of a VAE, and such models "
            "cannot be trained yet: load an image model with a VAE."
        )


def is_single_frame(base) -> bool:
    """Whether an image model takes its latents (B, C, 1, h, w), as a video of one frame."""
    named = any(ancestor.__name__ in SINGLE_FRAMES for ancestor in type(base).__mro__)
    return named and base.latent_format.latent_dimensions == 3


def _known(base) -> Family | None:
    """The row of a family that has one."""
    kind, config = type(base), base.model_config.unet_config
    if kind is comfy.model_base.SDXL:
        return families.SDXL
    if kind is comfy.model_base.BaseModel:
        return {768: families.SD15, 1024: families.SD2}.get(config.get("context_dim"))
    if kind is comfy.model_base.SD3:
        return _sd3(base.diffusion_model.joint_blocks)
    if kind is comfy.model_base.Flux:
        return families.FLUX if config.get("guidance_embed") else families.SCHNELL
    if kind.__name__ == "Chroma":
        return families.CHROMA
    return None


def _sd3(blocks) -> Family:
    """SD 3 medium and SD 3.5 medium have 24 blocks, of which 3.5's have a second attention; large has 38."""
    if any(block.x_block.x_block_self_attn for block in blocks):
        return families.SD35_MEDIUM
    return families.SD35_LARGE if len(blocks) > 24 else families.SD3


def _by_structure(base, kind: str) -> Family:
    config = base.model_config.unet_config
    plain = kind.lower()
    names = NAMES.get(kind, (kind, plain, plain, 4.0))
    if kind == "Lumina2" and config.get("dim") == Z_IMAGE_WIDTH:
        names = Z_IMAGE
    title, version, architecture, cfg = names
    family = family_by_structure(
        base.diffusion_model,
        name=version,
        title=title,
        base_model_version=version,
        architecture=f"{architecture}/lora",
        cfg=cfg,
        # A network that was distilled with guidance is trained without it, as FLUX is.
        guidance=1.0 if config.get("guidance_embed") else None,
    )
    if family is None:
        raise ValueError(
            f"This MODEL is a {kind}, in which no repeated blocks with attention were found to adapt: load an image "
            "model made of such blocks."
        )
    return family


def _calls(network, kernel: str) -> bool:
    """Whether the code that ComfyUI has for a network names a kernel."""
    modules = {kind.__module__ for kind in type(network).__mro__ if kind.__module__.startswith("comfy.")}
    return any(f".{kernel}(" in inspect.getsource(sys.modules[name]) for name in modules)


def _has_more_inputs(base) -> bool:
    config = base.model_config.unet_config
    return config.get("in_channels") != config.get("out_channels", config.get("in_channels"))


def _takes_a_second_picture(base) -> bool:
    """Whether the network is fed another picture beside the noisy one, as inpainting and editing variants are."""
    noise = torch.zeros(1, base.latent_format.latent_channels, *[1] * is_single_frame(base), 8, 8)
    return bool(base.concat_keys) or base.concat_cond(noise=noise, latent_image=noise, device=noise.device) is not None


def text_widths(base) -> tuple[int | None, int | None]:
    """How wide the text and the pooled text are that the network takes; None where its configuration does not say.

    SDXL adds six sizes of 256 numbers each to the pooled text.
    """
    config = base.model_config.unet_config
    embedder = config.get("context_embedder_config") or {}
    widths = [config.get(name) for name in ("context_in_dim", "context_dim", "cap_feat_dim", "cond_seq_dim")]
    widths.append(embedder.get("params", {}).get("in_features"))
    pooled = config.get("adm_in_channels")
    if pooled is not None and type(base) is comfy.model_base.SDXL:
        pooled -= 6 * 256
    return next((width for width in widths if isinstance(width, int)), None), pooled or config.get("vec_in_dim")
