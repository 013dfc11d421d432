"""LoRAs put onto a MODEL and a CLIP one after the other, as a chain of Load LoRA nodes puts them, with less to do."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import comfy.lora
import comfy.lora_convert
from torch import Tensor

from ...lora_files.opening import SUFFIXES, LoraFile, check_lora, finite
from ...training.embeddings import layers_only
from ...training.lora_family import family_of
from ...training.patterns import Overrides
from . import blocks, loras
from .patches import key_map

Version = tuple[Path, int, int]
MOST_NODES = 8
ENDS = re.compile(r"\.|_lora(?=\.)")


@dataclass(frozen=True)
class ReadLora:
    """A LoRA file as it was read: its layers as the loader takes them, and what it says about itself."""

    version: Version
    tensors: dict[str, Tensor]
    entries: dict[str, str]
    families: tuple[str, ...]
    """Those it may be for: the one it says, and the one its layers tell; files that were copied together may err."""
    layers: frozenset[str]
    """What its tensors' names begin with; no other of the loader's names needs to be looked for in it."""


class Shelf:
    """The files that each node's last run named: its next run reads none of them again unless they changed."""

    def __init__(self) -> None:
        self._kept: dict[Version, ReadLora] = {}
        self._named: OrderedDict[str, set[Path]] = OrderedDict()

    def take(self, path: Path) -> ReadLora:
        """The file, read if it is not kept as it is now; ValueError when it cannot be read."""
        version = version_of(path)
        if version not in self._kept:
            self._kept[version] = _read(version)
        return self._kept[version]

    def keep(self, node_id: str, paths: Iterable[Path | None]) -> None:
        """Let go of what no node named in its last run; `paths` are this node's, those that are off among them."""
        self._named.pop(node_id, None)
        self._named[node_id] = {path for path in paths if path is not None}
        while len(self._named) > MOST_NODES:
            self._named.popitem(last=False)
        wanted = set().union(*self._named.values())
        self._kept = {version: file for version, file in self._kept.items() if version[0] in wanted and is_now(version)}


SHELF = Shelf()


def version_of(path: Path) -> Version:
    """What changes when a file does: its path, time of change and size; ValueError when it cannot be asked."""
    try:
        facts = path.stat()
    except OSError as error:
        raise ValueError(f"The LoRA file '{path.name}' cannot be read ({error}): choose another file.") from error
    return path, facts.st_mtime_ns, facts.st_size


def is_now(version: Version) -> bool:
    """Whether the file is still the one that was read."""
    try:
        return version_of(version[0]) == version
    except ValueError:
        return False


def _read(version: Version) -> ReadLora:
    path = version[0]
    if path.suffix.lower() in SUFFIXES:
        check_lora(path)
    tensors, entries = loras.read_file(path)
    finite(LoraFile(path, tensors, entries))
    # Embeddings beside the layers are for other programs: ComfyUI would only warn that it does not know them.
    layers = comfy.lora_convert.convert_lora(layers_only(tensors))
    # Of each layer's tensors one is enough to tell the family, and there are thousands.
    names = {name.rpartition(".lora_")[0] or name for name in layers if not name.endswith(".alpha")}
    families = tuple(filter(None, (family_of(entries), family_of(names))))
    return ReadLora(version, layers, entries, families, beginnings(layers))


def beginnings(names: Iterable[str]) -> frozenset[str]:
    """All that can be the name of a layer: what stands before any dot of a name, or before `_lora`."""
    return frozenset(name[: end.start()] for name in names for end in ENDS.finditer(name))


class Chain:
    """A MODEL and a CLIP (or None) with LoRAs on; what was passed in stays as it was.

    The names under which the loader knows the weights are made once for all LoRAs, not once for each.
    """

    def __init__(self, model, clip) -> None:
        self.model, self.clip = model, clip
        self.keys: dict[str, object] | None = None

    def add(
        self, lora: ReadLora, strength_model: float, strength_clip: float, strengths: Overrides = ()
    ) -> Mapping[object, object]:
        """Put one more on, by blocks where `strengths` say so; the loader's patches (target -> patch)."""
        if self.keys is None:
            self.keys = key_map(self.model, self.clip)
            self.model, self.clip = self.model.clone(), None if self.clip is None else self.clip.clone()
        keys = {name: target for name, target in self.keys.items() if name in lora.layers}
        try:
            patches = comfy.lora.load_lora(lora.tensors, keys, log_missing=False)
        except (KeyError, RuntimeError) as error:  # a layer without one of its tensors, an alpha that is no number
            raise ValueError(
                f"The LoRA file '{lora.version[0].name}' is broken, so download or train it again: {error}."
            ) from error
        parts = blocks.split(patches, strengths) if strengths else {1.0: patches}
        sides = [(self.model, self.model, strength_model)]
        if self.clip is not None:
            sides.append((self.clip, self.clip.patcher, strength_clip))
        for side, patcher, strength in sides:
            for factor, part in parts.items():
                side.add_patches(part, strength * factor)
            if lora.entries and loras.TAKES_METADATA:
                patcher.set_attachments("lora_metadata", dict(lora.entries))
        return patches
