"""Local caption models: which there are, of what kind each is, and how it is opened."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from .captioner import Captioner
from .wd_tagger import LIST_OF_TAGS, open_tagger

TAGGER, FLORENCE, BLIP, CHAT = "tagger", "Florence-2", "BLIP", "chat"
KINDS = {"florence2": FLORENCE, "blip": BLIP, "blip-2": BLIP}
"""By the ``model_type`` in ``config.json``, never by the name of the folder."""
EYES = ("vision_config", "vision_tower", "vision_tower_config")
"""What the ``config.json`` of a model that can look at pictures has one of."""
DEEPEST = 3


def kind_of(path: Path) -> str | None:
    """What a folder or file holds: a kind of captioner, or None."""
    if path.suffix == ".onnx":
        return TAGGER if path.is_file() and path.with_suffix(".csv").is_file() else None
    if (path / LIST_OF_TAGS).is_file():
        return TAGGER
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        kind = KINDS.get(config.get("model_type"))
    except (OSError, ValueError, AttributeError, TypeError):
        return None
    return kind or (CHAT if any(part in config for part in EYES) and "model_type" in config else None)


def find_models(base: Path) -> dict[str, Path]:
    """The caption models in a folder and DEEPEST levels down, by their path in it with ``/``; {} when it is missing."""
    return {path.relative_to(base).as_posix(): path for path in _models(base, DEEPEST)}


def _models(folder: Path, deepest: int) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir(), key=lambda path: path.name.casefold())
    except OSError:
        return
    for path in entries:
        if path.name.startswith("."):
            continue
        if kind_of(path):
            yield path
        elif deepest > 1 and path.is_dir():
            yield from _models(path, deepest - 1)


def open_local(path: Path, dtype: torch.dtype = torch.float32) -> Captioner:
    """The captioner in a folder or file, on the CPU, with its weights in ``dtype``; ValueError when there is none.

    Its ``network`` is the module whose device it works on, or None where that is not PyTorch's business.
    """
    kind = kind_of(path)
    if kind is None:
        raise ValueError(
            f"There is no caption model in {path.name}: it needs a config.json of a model that sees pictures, or a "
            f"{LIST_OF_TAGS}."
        )
    if kind == TAGGER:
        return open_tagger(path)
    # Each of these needs its own parts of transformers, and none is needed before it is used.
    if kind == FLORENCE:
        from .florence import Florence

        return Florence(path, dtype)
    if kind == BLIP:
        from .blip import Blip

        return Blip(path, dtype)
    from .chat_model import ChatModel

    return ChatModel(path, dtype)
