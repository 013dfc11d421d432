"""New words: vectors that are trained in the place of a trigger word, and the form in which they are kept.

An encoder reads a word as one or more rows of its table. A new word brings rows of its own (Gal et al. 2022, textual
inversion), trained together with the LoRA (pivotal tuning). A row r is trained as a direction alone,

    e = |r0| v / |v|,    v0 = r0 sqrt(D) / (64 |r0|),

so that it stays as long as the row r0 it began with. Left free, rows grow until they drown out the other words;
diffusers' advanced trainer pulls them back after every step for that reason. Every v begins as large as the others,
whatever the encoder's table, so that one learning rate suits them all.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .dataset import Example

BUNDLED = "bundle_emb."
FIRST_ENTRY = 1 / 64
"""The root mean square of what is trained of a row; rows of CLIP-L's table have 0.014."""
MOST_DECAY = 0.1
"""More weight decay than this would do nothing but shorten v, so that steps turn it further and further: AdamW lets the
entries of v settle at sqrt(rate / (2 decay)), which this leaves above where they begin at all usual rates."""


def new_words(examples: Iterable[Example]) -> dict[str, str]:
    """Trigger word -> what it is, in the order of the examples; ValueError when no example has a trigger word."""
    words: dict[str, str] = {}
    for example in examples:
        if trigger := example.trigger_word.strip():
            kind = _whole([trigger]).sub(" ", example.class_words)
            words[trigger] = words.get(trigger) or " ".join(kind.split())
    if not words:
        raise ValueError(
            "new_tokens trains what a trigger word means, but this dataset has none: give the LoRA Dataset Loader a "
            "trigger_word, or set new_tokens to 0."
        )
    return words


def worded(text: str, names: Mapping[str, str]) -> str:
    """The text with every trigger word, whole and in any case, said as `embedding:<name>`, as ComfyUI's prompts do.

    ComfyUI takes an embedding's name from the word's beginning to the next white space, so that is put around it.
    """
    if not names:
        return text
    said = {trigger.casefold(): name for trigger, name in names.items()}

    def embedding(found: re.Match[str]) -> str:
        before = "" if text[: found.start()][-1:].strip() == "" else " "
        after = "" if text[found.end() :][:1].strip() == "" else " "
        return f"{before}embedding:{said[found[0].casefold()]}{after}"

    return _whole(said).sub(embedding, text)


def embedding_names(triggers: Iterable[str], lora_name: str) -> dict[str, str]:
    """Trigger word -> the name of its embedding beside the LoRA file `lora_name`, folders included, without suffix.

    A prompt ends a name at white space and may read brackets in it as weights, so neither is in it. Words that are the
    same without these are numbered, in whatever order they come.
    """
    triggers = list(triggers)
    parts = lora_name.replace("\\", "/").rpartition(".")
    place = "/".join(_spoken(part) for part in (parts[0] or parts[2]).split("/"))
    if len(triggers) == 1:
        return {triggers[0]: place}
    names, taken = {}, Counter()
    for trigger in sorted(triggers):
        word = _spoken(trigger)
        taken[word.casefold()] += 1
        number = taken[word.casefold()]
        names[trigger] = f"{place}_{word}" + (f"-{number}" if number > 1 else "")
    return {trigger: names[trigger] for trigger in triggers}


def embedding_path(folder: Path, name: str) -> Path:
    """Where the embedding of that name lies in an embeddings folder."""
    return folder.joinpath(*f"{name}.safetensors".split("/"))


def bundled(vectors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Embeddings (trigger word -> encoder -> rows) as tensors of a LoRA file, in OneTrainer's words."""
    return {
        f"{BUNDLED}{trigger}.{encoder}": rows.contiguous()
        for trigger, encoders in vectors.items()
        for encoder, rows in encoders.items()
    }


def unbundled(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Embeddings (trigger word -> encoder -> rows) out of the tensors of a LoRA file."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, rows in tensors.items():
        if name.startswith(BUNDLED):
            trigger, _, encoder = name.removeprefix(BUNDLED).rpartition(".")
            found.setdefault(trigger, {})[encoder] = rows
    return found


def layers_only(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a LoRA file without those of embeddings, which are no layers."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(BUNDLED)}


def bundled_words(names: Iterable[str]) -> tuple[str, ...]:
    """The trigger words whose embeddings are among the tensors of a LoRA file, by the tensors' names."""
    found = (name.removeprefix(BUNDLED).rpartition(".")[0] for name in names if name.startswith(BUNDLED))
    return tuple(dict.fromkeys(found))


def first_rows(known: Tensor | None, mean: Tensor, deviation: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """The rows (count, D) a new word begins with: those `known` (m, D) of its class, in turn.

    Without any, the mean (D,) of the table's rows and a random number for each entry, spread as the table's are: such
    rows mean nothing, yet are of the table's kind and length.
    """
    if known is not None and len(known):
        return known[torch.arange(count) % len(known)].clone()
    return mean + deviation * torch.randn(count, len(mean), generator=draw)


def trained_form(rows: Tensor) -> tuple[Tensor, Tensor]:
    """v (n, D) and |r0| (n, 1) of rows r0."""
    lengths = torch.linalg.vector_norm(rows.double(), dim=1, keepdim=True)
    return (rows * (FIRST_ENTRY * rows.shape[1] ** 0.5 / lengths)).float(), lengths.float()


def rows_of(trained: Tensor, lengths: Tensor) -> Tensor:
    """The rows e (n, D) that v stands for. In double precision, so that every device rounds to the same row."""
    # Apple's and Intel's GPUs have no float64.
    v = (trained if trained.device.type == "cuda" else trained.cpu()).double()
    return (v * (lengths.to(v) / torch.linalg.vector_norm(v, dim=1, keepdim=True))).float().to(trained.device)


def _whole(words: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, longest_first))})(?!\w)", re.IGNORECASE)


def _spoken(part: str) -> str:
    return re.sub(r"[^\w.\-]+", "_", part).strip("_")
