"""WD taggers (SmilingWolf's, trained on Danbooru): pictures become tags, through timm or onnxruntime."""

import csv
import importlib.util
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from .captioner import Answer
from .tags import spaced

LIST_OF_TAGS, WEIGHTS, ONNX = "selected_tags.csv", "model.safetensors", "model.onnx"
GENERAL, CHARACTER = "0", "4"
"""Categories of Danbooru; others, such as the ratings (9), do not belong in a caption."""
LEAST_SCORES = {CHARACTER: 0.85, GENERAL: 0.35}
"""How sure it must be, per category and in the order in which they are written; a wrong name does more harm."""
BATCH = 8

Network = Callable[[np.ndarray], np.ndarray]
"""(pictures, height, width, BGR) float32 of 0 to 255 -> (pictures, tags) probabilities."""


class Tag(NamedTuple):
    """A row of the list of tags."""

    name: str
    category: str


class WdTagger:
    """Answers with the tags that a network is sure of: characters first, the surest first."""

    writes_tags = True
    follows_instructions = False

    def __init__(self, tags: Sequence[Tag], network: "TimmNetwork | OnnxNetwork"):
        self.batch_size = network.batch_size
        self.network = network.module
        self._tags, self._read = tags, network

    def caption(self, images: Sequence[Image.Image], instruction: str = "") -> list[Answer]:
        scores = self._read(np.stack([as_input(image, self._read.size) for image in images]))
        if scores.shape != (len(images), len(self._tags)):
            raise ValueError(
                f"the tagger scores {scores.shape[-1]} tags, but its list has {len(self._tags)}: "
                "the model and its .csv file do not belong together"
            )
        return [Answer(", ".join(sure_tags(self._tags, row))) for row in scores]

    def close(self) -> None:
        self.network = self._read = None


def open_tagger(path: Path) -> WdTagger:
    """The tagger in a folder with ``selected_tags.csv``, or in a single ``.onnx`` file with a ``.csv`` beside it.

    Raises ValueError or ImportError when it lacks a file or the package to run it with.
    """
    if path.suffix == ".onnx":
        return WdTagger(read_tags(path.with_suffix(".csv")), OnnxNetwork(path))
    tags = read_tags(path / LIST_OF_TAGS)
    has_weights = (path / WEIGHTS).is_file() and (path / "config.json").is_file()
    if has_weights and (_installed("timm") or not (path / ONNX).is_file()):
        return WdTagger(tags, TimmNetwork(path, len(tags)))
    if (path / ONNX).is_file():
        return WdTagger(tags, OnnxNetwork(path / ONNX))
    raise ValueError(
        f"The tagger folder {path.name} holds neither {WEIGHTS} with config.json nor {ONNX}: copy them in."
    )


def read_tags(path: Path) -> list[Tag]:
    """The list of tags, whatever the order of its columns; ValueError when it is none."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            tags = [Tag(row["name"], row["category"].strip()) for row in csv.DictReader(file)]
    except (OSError, KeyError, AttributeError, UnicodeDecodeError, csv.Error):
        tags = []
    if not tags:
        raise ValueError(
            f"{path.name} is not the list of tags of a WD tagger, with the columns name and category: copy it in again."
        )
    return tags


def sure_tags(tags: Sequence[Tag], scores: np.ndarray) -> list[str]:
    """The names of the tags whose score reaches the least of their category, as they belong in a caption."""
    return [
        spaced(tags[index].name)
        for category, least in LEAST_SCORES.items()
        for index in np.argsort(-scores, kind="stable")
        if tags[index].category == category and scores[index] >= least
    ]


def as_input(image: Image.Image, size: int) -> np.ndarray:
    """The picture as the networks were trained: on a white square, bicubic, (size, size, BGR) float32 of 0 to 255."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    pixels = np.asarray(square.resize((size, size), Image.Resampling.BICUBIC), dtype=np.float32)
    return pixels[:, :, ::-1]


class TimmNetwork:
    """A tagger's network in PyTorch, on whatever device its module is."""

    batch_size = BATCH

    def __init__(self, folder: Path, tags: int):
        if not _installed("timm"):
            raise ImportError(f"The tagger {folder.name} needs the package timm: install it with 'pip install timm'.")
        import timm
        from safetensors.torch import load_file

        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self.size = config["pretrained_cfg"]["input_size"][-1]
        with torch.random.fork_rng(devices=[]):
            self.module = timm.create_model(
                config["architecture"], pretrained=False, num_classes=tags, **config.get("model_args", {})
            )
        self.module.load_state_dict(load_file(folder / WEIGHTS))
        self.module.train(False)

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        weight = next(self.module.parameters())
        with torch.inference_mode():
            pixels = torch.from_numpy(pictures.transpose(0, 3, 1, 2).copy()).to(weight.device, weight.dtype)
            return self.module(pixels / 127.5 - 1).sigmoid().float().cpu().numpy()


class OnnxNetwork:
    """A tagger's network in onnxruntime, on the CPU; its output are probabilities already."""

    module = None

    def __init__(self, path: Path):
        if not _installed("onnxruntime"):
            raise ImportError(
                f"The tagger {path.name} needs the package timm (with {WEIGHTS}) or onnxruntime: install one of them, "
                "such as with 'pip install onnxruntime'."
            )
        import onnxruntime

        self._session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self._input = self._session.get_inputs()[0]
        pictures, self.size = self._input.shape[:2]
        self.batch_size = pictures if isinstance(pictures, int) else BATCH

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        return self._session.run(None, {self._input.name: np.ascontiguousarray(pictures)})[0]


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
