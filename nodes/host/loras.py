"""Reads LoRA files and puts them onto a MODEL and a CLIP, exactly as ComfyUI's own loader does."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError

import comfy.model_base
import comfy.sd
import comfy.utils
from safetensors import SafetensorError
from torch import Tensor

from ...training.embeddings import bundled_words, embedding_names, layers_only, worded
from .architecture import Z_IMAGE_WIDTH

FAMILIES = {
    "SDXL": "sdxl",
    "SDXL_instructpix2pix": "sdxl",
    "SD3": "sd3",
    "Flux": "flux",
    "Flux2": "flux2",
    "SD15_instructpix2pix": "sd1",
    "Chroma": "chroma",
    "QwenImage": "qwen_image",
    "Lumina2": "lumina2",
    "HunyuanImage21": "hunyuan_image",
    "HiDream": "hidream",
    "AuraFlow": "aura_flow",
    "PixArt": "pixart",
}
TEXT_WIDTHS = {768: "sd1", 1024: "sd2"}
TAKES_METADATA = "lora_metadata" in inspect.signature(comfy.sd.load_lora_for_models).parameters


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a LoRA file, and what it says about itself ({} for a file that says nothing or cannot say it).

    ValueError naming the file when it cannot be read.
    """
    try:
        tensors, entries = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    except (SafetensorError, UnpicklingError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"The LoRA file '{Path(path).name}' cannot be read, so download or train it again: {error}"
        ) from error
    return tensors, dict(entries or {})


def read_lora(path: Path) -> dict[str, Tensor]:
    """The tensors of a LoRA file, which stays free to be replaced; ValueError naming it when it cannot be read.

    ComfyUI maps files into memory, and Windows lets nobody replace or delete a file that is mapped.
    """
    return {name: tensor.clone() for name, tensor in read_file(path)[0].items()}


def apply(
    model,
    clip,
    lora: Mapping[str, Tensor],
    strength_model: float,
    strength_clip: float,
    metadata: Mapping[str, str] | None = None,
):
    """The MODEL and the CLIP with the LoRA on, as Load LoRA gives them; what was passed in stays as it was.

    ``clip`` may be None. With both strengths zero nothing is done, as in Load LoRA.
    """
    if clip is None:
        strength_clip = 0.0
    if strength_model == 0 and strength_clip == 0:
        return model, clip
    # ComfyUI versions that hand the file's metadata on with the model take one argument more.
    told = {"lora_metadata": dict(metadata)} if metadata and TAKES_METADATA else {}
    # Embeddings beside the layers are for other programs: ComfyUI would only warn that it does not know them.
    return comfy.sd.load_lora_for_models(model, clip, layers_only(lora), strength_model, strength_clip, **told)


def text_with(lora: Mapping[str, Tensor], lora_name: str, prompts: Sequence[str]) -> list[str] | None:
    """The prompts as they are said to the CLIP with the LoRA on; None when the LoRA changes nothing about text.

    The file's new words are said as the embeddings that lie beside it in ComfyUI's folder.
    """
    words = bundled_words(lora)
    if not words and not any(name.startswith("lora_te") for name in lora):
        return None
    names = embedding_names(words, lora_name)
    return [worded(prompt, names) for prompt in prompts]


def patched_layers(clip) -> int:
    """How many patches lie on the weights of a CLIP; a LoRA that fits nothing adds none."""
    return sum(map(len, clip.patcher.patches.values()))


def model_family(model) -> str:
    """The family of a MODEL, such as "sdxl", or "unknown:" and the name of its class."""
    base = model.model
    name = type(base).__name__
    if type(base) is comfy.model_base.BaseModel:
        width = base.model_config.unet_config.get("context_dim")
        return TEXT_WIDTHS.get(width, f"unknown:{name}")
    if name == "Lumina2" and base.model_config.unet_config.get("dim") == Z_IMAGE_WIDTH:
        return "z_image"
    return FAMILIES.get(name, f"unknown:{name}")
