"""Model folders in the layout of the transformers library, opened without network and without any code out of them."""

import json
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from .asking import LONGEST_CAPTION_TOKENS


def read_config(folder: Path) -> dict:
    """What ``config.json`` says of the model; ValueError when it cannot be read."""
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            f"The file config.json of the model {folder.name} cannot be read: copy it in again."
        ) from error


def open_processor(folder: Path):
    """The processor of the folder: pictures and text in, tensors out."""
    with named(folder):
        from transformers import AutoProcessor

        return AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def open_network(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """The network of the folder, in memory and ready to answer; ValueError when this transformers cannot run it.

    Safetensors are preferred; files in Torch's own format are read as weights only, so nothing in them is run.
    """
    with named(folder):
        import transformers

        network = transformers.AutoModelForImageTextToText.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=has_safetensors(folder),
            weights_only=True,
            **{dtype_argument(transformers.__version__): dtype},
        )
    return prepared(network)


def prepared(network: torch.nn.Module) -> torch.nn.Module:
    """The network set to answer, and without settings for drawing words at random, which would never be used."""
    for name in ("temperature", "top_p", "top_k"):
        setattr(network.generation_config, name, None)
    return network.train(False)


def has_safetensors(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))


def dtype_argument(version: str) -> str:
    """The name that this version of transformers has for the data type of the weights."""
    return "dtype" if tuple(map(int, version.split(".")[:2])) >= (4, 56) else "torch_dtype"


def generate(network: torch.nn.Module, inputs: Mapping[str, torch.Tensor], **settings) -> torch.Tensor:
    """The tokens that the network answers with, the surest ones and so always the same: (pictures, tokens)."""
    device, dtype = network.device, network.dtype
    inputs = {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in inputs.items()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.inference_mode():
        return network.generate(**inputs, do_sample=False, max_new_tokens=LONGEST_CAPTION_TOKENS, **settings)


@contextmanager
def named(folder: Path) -> Iterator[None]:
    """Leaves random numbers as they were, and turns what transformers says about a folder into one sentence."""
    kind = read_config(folder).get("model_type", "")
    try:
        import transformers
    except ImportError as error:
        raise ImportError("Local caption models need the package transformers, which ComfyUI requires.") from error
    if kind not in transformers.CONFIG_MAPPING:
        own = "auto_map" in read_config(folder)
        raise ValueError(
            f"The model {folder.name} is of the kind '{kind}', which transformers {transformers.__version__} does not "
            f"know{' without program code of its own, and that is never run' if own else ''}: update transformers, or "
            "choose another model."
        )
    try:
        with torch.random.fork_rng([]):
            yield
    except pickle.UnpicklingError as error:  # Torch's own words advise to load it all the same
        raise ValueError(
            f"The model {folder.name} cannot be opened: its weight file holds more than weights, and that is never "
            "loaded. Get the model as .safetensors."
        ) from error
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, AttributeError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"The model {folder.name} cannot be opened with transformers {transformers.__version__}: {reason}"
        ) from error
