"""Training that begins where a LoRA file ends, whoever made the file.

It is read as ComfyUI's loader reads it, so every form of key that works there works here (kohya's, diffusers', peft's,
ComfyUI's own), alpha counts, and step 0 answers as the loader does.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import comfy.lora
import comfy.lora_convert
import torch
from comfy.weight_adapter import LoHaAdapter, LoKrAdapter, LoRAAdapter, OFTAdapter
from torch import Tensor

from ...training.config import LOHA, LOKR, OFT
from ...training.embeddings import layers_only, unbundled
from ...training.factors import Factors, factors_of
from ...training.kinds.lokr import Division, settings_for
from ...training.lora import Adapter, Adapters
from ...training.warm_start import start_low_rank, start_same_kind
from .loras import read_lora
from .new_tokens import NewTokens
from .patches import (
    Patches,
    called,
    change_of,
    factors_of_patch,
    holder,
    key_map,
    listed,
    magnitude_of,
    place_of,
    scale_of,
)

OWN_KIND = {LOHA: LoHaAdapter, LOKR: LoKrAdapter, OFT: OFTAdapter}
"""The kinds that begin as their own in a file alone, and what the loader reads these as."""
TENSOR = re.compile(
    r"(\.(lora_(up|down|mid|A|B)|lora\.(up|down)|lora_linear_layer\.(up|down)|hada_\w+|lokr_\w+)|_lora\.(up|down)"
    r"|\.(oft_blocks|rescale|alpha|dora_scale|diff|diff_b|set_weight|w_norm|b_norm|reshape_weight))(\.default)?(\.weight)?$"
)
"""How the name of a layer's tensor ends in a file."""


def warm_start(adapters: Adapters, model, clip, path: Path, tokens: NewTokens | None = None) -> str:
    """Let the adapters, and new words, begin as the file ends, and say in a line how much of it they took over.

    Call it before the adapters are attached. `clip` may be None; then layers of text encoders are left out. ValueError
    when the file cannot be read, fits the model nowhere, or is of a kind that these adapters cannot begin as.
    """
    file, keys = Path(path).name, key_map(model, clip)
    lora = comfy.lora_convert.convert_lora(read_lora(path))
    words = start_words(tokens, lora)
    with torch.no_grad():
        by_weight = _by_weight(_patches(lora, keys, file))
        report, known = _Report(file), []
        for adapter in adapters:
            weight, _ = place_of(keys.get(adapter.key, ("", None)))
            if patches := by_weight.pop(weight, None):
                known.append((adapter, weight, patches))
        for adapter, weight, patches in known:
            norms = _start(adapter, weight, patches, holder(weight, model, clip))
            if norms is None:
                raise ValueError(_misfit(adapter, known, file))
            report.add(adapter, *norms)
        if tokens is not None:
            _begin_words(adapters, tokens)
    unknown = {TENSOR.sub("", name) for name in layers_only(lora)} - keys.keys()
    left_out = [called(weight) for weight in by_weight] + sorted(unknown)
    if not report.taken:
        raise ValueError(
            f"'{file}' changes other layers than those that are trained ({listed(left_out)}): choose other layers."
        )
    return report.line(left_out) + "".join(f" {sentence}" for sentence in words)


def start_words(tokens: NewTokens | None, lora: dict[str, Tensor]) -> list[str]:
    """Let new words begin as the embeddings in a file's tensors, and say of each of these what became of it."""
    rows = unbundled(lora)
    misfits = tokens.begin_as(rows) if tokens is not None else {}
    sentences = []
    for word in rows:
        why = misfits.get(word, "it is no new token of this training")
        sentences.append(
            f"The word '{word}' is left out: {why}." if why else f"The word '{word}' goes on with its embedding."
        )
    return sentences


def _begin_words(adapters: Adapters, tokens: NewTokens) -> None:
    """What is trained of the words becomes what they begin as."""
    begun = {adapter.key: adapter.tensors["direction"] for adapter in tokens.adapters(rate=1.0)}
    for adapter in adapters:
        if adapter.key in begun:
            adapter.tensors["direction"].copy_(begun[adapter.key])


def check_fit(model, clip, path: Path, kind: str) -> None:
    """ValueError when the file cannot be read, fits the model nowhere, or holds nothing that this kind begins as."""
    file = Path(path).name
    patches = _patches(comfy.lora_convert.convert_lora(read_lora(path)), key_map(model, clip), file)
    own = OWN_KIND.get(kind)
    if own is not None and not any(isinstance(patch, own) for patch in patches.values()):
        raise ValueError(
            f"'{file}' holds no {kind}, and adapters of that kind can only begin as such: set the kind to lora or "
            "dora, which can begin as any file, or start from nothing."
        )


def _patches(lora: dict[str, Tensor], keys: dict, file: str) -> dict:
    patches = comfy.lora.load_lora(lora, keys, log_missing=False)
    if not patches:
        raise ValueError(f"'{file}' has no layer that fits this model: choose a LoRA of its family to start from.")
    return patches


@dataclass
class _Report:
    """What became of the file, added up."""

    file: str
    taken: int = 0
    kept: float = 0.0
    whole: float = 0.0
    ranks: set[int] = field(default_factory=set)

    def add(self, adapter: Adapter, kept: float, whole: float) -> None:
        self.taken += 1
        self.kept, self.whole = self.kept + kept, self.whole + whole
        if "lokr_w2" not in adapter.tensors:  # a whole one has no rank
            self.ranks.add(adapter.kind.rank(adapter.tensors))

    def line(self, left_out: list[str]) -> str:
        """The report in words."""
        share = (self.kept / self.whole) ** 0.5 if self.whole else 1.0
        ranks = f" at rank {', '.join(map(str, sorted(self.ranks)))}" if self.ranks else ""
        effect = "with all of its effect" if share > 1 - 1e-6 else f"which keeps {100 * share:.4g} % of its effect"
        layers = "1 layer" if self.taken == 1 else f"{self.taken} layers"
        line = f"Started from '{self.file}': {layers}{ranks}, {effect}"
        return f"{line}; not trained here and left out: {listed(left_out)}." if left_out else f"{line}."


def _by_weight(patches: dict[object, object]) -> dict[str, Patches]:
    """The loader's patches, gathered by the weight they change, in its order."""
    gathered: dict[str, Patches] = {}
    for target, patch in patches.items():
        key, place = place_of(target)
        gathered.setdefault(key, []).append((patch, place))
    return gathered


def _start(adapter: Adapter, key: str, patches: Patches, patcher) -> tuple[float, float] | None:
    """Begin one adapter; the squared norms of what is kept of the change and of all of it. None if it cannot."""
    (patch, place), *others = patches
    if not others and place is None and (said := _entries(patch)) and start_same_kind(adapter, *said):
        size = adapter.kind.norm(adapter.tensors, adapter.scale).item() ** 2
        return size, size
    if "down" not in adapter.tensors:
        return None
    shape = (adapter.up.shape[1] if adapter.up.ndim == 2 else len(adapter.up), adapter.down[0].numel())
    factors = [factors_of_patch(patch, place, shape) for patch, place in patches]
    if all(factors):
        total = factors[0]
        for other in factors[1:]:
            total = total.plus(other)
        return start_low_rank(adapter, total)
    change = change_of(patcher, key, patches).flatten(1)
    # Apple's and Intel's GPUs have no float64.
    total, whole = factors_of(change if change.device.type == "cuda" else change.cpu(), len(adapter.down))
    kept, _ = start_low_rank(adapter, Factors(total.up.cpu(), total.down.cpu()))
    return kept, whole


def _misfit(adapter: Adapter, known: list[tuple[Adapter, str, Patches]], file: str) -> str:
    """Why an adapter of this kind cannot begin as the file's, and which settings would help."""
    divisions = [_division(other, patches) for other, _, patches in known]
    if "lokr_w1" in adapter.tensors and all(divisions) and (fitting := settings_for(divisions)):
        factor = fitting.pop("lokr_factor")
        *most, last = (f"{name} to {rank}{' or more' if factor else ''}" for name, rank in fitting.items())
        needed = ", ".join([f"lokr_factor to {factor}", *most])
        return (
            f"'{file}' is a LoKr divided in another way than is trained here: set {needed} and {last}, "
            "or start from nothing."
        )
    return (
        f"'{file}' has layer '{adapter.name}' in another form or at a higher rank than is trained here, "
        f"where only a LoRA or a DoRA could begin: set the kind to lora, or start from nothing."
    )


def _division(adapter: Adapter, patches: Patches) -> Division | None:
    """How a file divides a layer that it has as one LoKr; None for any other."""
    (patch, place), *others = patches
    entries = None if others or place is not None else _entries(patch)
    if not isinstance(patch, LoKrAdapter) or entries is None:
        return None
    tensors, _ = entries
    small = (
        tensors["lokr_w1"].shape if "lokr_w1" in tensors else (len(tensors["lokr_w1_a"]), tensors["lokr_w1_b"].shape[1])
    )
    return Division(adapter.layer, tuple(small), len(tensors["lokr_w2_b"]) if "lokr_w2_b" in tensors else None)


def _entries(patch: object) -> tuple[dict[str, Tensor], float] | None:
    """A patch as the tensors of a file and the factor the loader gives them; None for what no kind here has."""
    if isinstance(patch, LoRAAdapter):
        up, down, alpha, mid, magnitude, reshape = patch.weights
        entries = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": magnitude}
        fits = mid is None and reshape is None and magnitude is not None
        return (entries, scale_of(alpha, len(down))) if fits else None
    if not isinstance(patch, (LoHaAdapter, LoKrAdapter, OFTAdapter)) or magnitude_of(patch) is not None:
        return None
    if isinstance(patch, LoHaAdapter):
        w1_a, w1_b, alpha, w2_a, w2_b, t1, t2, _ = patch.weights
        entries = {"hada_w1_a": w1_a, "hada_w1_b": w1_b, "hada_w2_a": w2_a, "hada_w2_b": w2_b}
        return (entries, scale_of(alpha, len(w1_b))) if t1 is None and t2 is None else None
    if isinstance(patch, LoKrAdapter):
        w1, w2, alpha, w1_a, w1_b, w2_a, w2_b, t2, _ = patch.weights
        names = ("lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a", "lokr_w2_b")
        parts = dict(zip(names, (w1, w2, w1_a, w1_b, w2_a, w2_b), strict=True))
        rank = next((len(rows) for rows in (w2_b, w1_b) if rows is not None), None)
        entries = {name: tensor for name, tensor in parts.items() if tensor is not None}
        return (entries, scale_of(alpha, rank) if rank else 1.0) if t2 is None else None
    blocks, rescale, alpha, _ = patch.weights
    return ({"oft_blocks": blocks}, alpha or 0.0) if rescale is None else None
