"""New words in the wired CLIP: captions as tokens with vectors in place of trigger words, as ComfyUI reads a prompt
with `embedding:<name>`.

CLIP-L and CLIP-G learn rows for the word. Any other encoder (T5) keeps the rows it reads the trigger word as, so that
it is told what it would be told without new words; the file says those rows too.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping
from functools import cached_property, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import comfy.model_management as mm
import torch
from comfy.sd1_clip import SDTokenizer
from safetensors.torch import save_file
from torch import Tensor, nn

from ...training.embeddings import (
    BUNDLED,
    MOST_DECAY,
    embedding_names,
    embedding_path,
    first_rows,
    rows_of,
    trained_form,
    worded,
)
from ...training.lora import Adapter
from ...training.noise import generator
from ...training.whole_file import tensor_bytes, write_atomically
from . import folders
from .text_encoders import CLIP_ENCODERS, encoders_of, literal_tokens

Rows = dict[str, dict[str, Tensor]]
"""Trigger word -> encoder -> rows (n, width)."""
MOST_TOKENS = 4096
_MARKER = (2,)


class NewTokens:
    """The new words of a run: what they begin as, and captions with them."""

    def __init__(self, clip, words: Mapping[str, str], count: int, seed: int) -> None:
        """`words` says what each trigger word is, "" where nobody did; each gets `count` rows an encoder.

        ValueError when the CLIP cannot read embeddings, or its encoders are none that learn them.
        """
        self._clip, self._words, self._count, self._seed = clip, dict(words), count, seed
        self._said: Rows = {}
        self._encoders = encoders_of(clip)
        self._tokenizers = {
            name: tokenizer for name, tokenizer in vars(clip.tokenizer).items() if isinstance(tokenizer, SDTokenizer)
        }
        # SD 3 may come without some of the encoders that its tokenizer reads for.
        self._readers = [name for name in self._tokenizers if name in self._encoders]
        if not any(name in CLIP_ENCODERS for name in self._readers):
            raise ValueError(
                "The CLIP has neither a CLIP-L nor a CLIP-G text encoder, which new tokens are trained in: "
                "set new_tokens to 0."
            )
        if any(tokenizer.embedding_directory is None for tokenizer in self._tokenizers.values()):
            raise ValueError(
                "The CLIP was loaded without a folder for embeddings, so no prompt could use the new tokens: "
                "load it with one of ComfyUI's own loaders, or set new_tokens to 0."
            )
        self.tokens = lru_cache(MOST_TOKENS)(self._tokens)

    @property
    def triggers(self) -> tuple[str, ...]:
        return tuple(self._words)

    @property
    def key(self) -> str:
        """What beside the CLIP decides how captions are encoded before training."""
        return hashlib.sha256(json.dumps([self._words, self._count, self._seed]).encode()).hexdigest()[:16]

    def begin_as(self, rows: Rows) -> dict[str, str]:
        """Begin as a file ends, where its rows fit; trigger word -> why they do not, "" where they do.

        Words that the file has nothing of are passed over.
        """
        why = {trigger: self._misfit(rows[trigger]) for trigger in self._words if trigger in rows}
        self._said = {trigger: rows[trigger] for trigger, problem in why.items() if not problem}
        vars(self).pop("_first", None)
        return why

    def _misfit(self, rows: Mapping[str, Tensor]) -> str:
        for name in (name for name in CLIP_ENCODERS if name in self._readers):
            width = self._encoders[name].transformer.get_input_embeddings().weight.shape[1]
            found = rows.get(name)
            if found is None or found.ndim != 2 or found.shape[1] != width:
                return f"it has no rows for the {width} numbers a token has in {name}"
            if len(found) != self._count:
                return f"it has {len(found)} tokens there, so set new_tokens to {len(found)} to go on from them"
            if not (found.float().norm(dim=1) > 0).all() or not found.isfinite().all():
                return "its rows are zero or not finite"
        return ""

    @cached_property
    def _first(self) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
        """Trigger word -> encoder -> what is trained, and the lengths of its rows."""
        trained = [name for name in CLIP_ENCODERS if name in self._readers]
        # Nodes run in inference mode, where nothing that is made can be trained with.
        with torch.inference_mode(False):
            return {
                trigger: {name: self._begun(name, trigger, number) for name in trained}
                for number, trigger in enumerate(self._words)
            }

    @cached_property
    def _kept(self) -> Rows:
        """The rows that the other encoders read the trigger words as."""
        others = [name for name in self._readers if name not in CLIP_ENCODERS]
        return {trigger: {name: self._read(name, trigger) for name in others} for trigger in self._words}

    def adapters(self, rate: float) -> list[Adapter]:
        """What is trained: an adapter without layer for each word and encoder."""
        return [
            Adapter(
                key=f"{BUNDLED}{trigger}.{name}",
                name=f"{trigger}.{name}",
                prefix=BUNDLED,
                layer=None,
                kind=None,
                tensors={"direction": nn.Parameter(first.clone())},
                rate=rate,
                until=1.0,
                most_decay=MOST_DECAY,
            )
            for trigger, encoders in self._first.items()
            for name, (first, _) in encoders.items()
        ]

    def rows(self, trained: Mapping[str, Tensor] | None = None) -> Rows:
        """The rows of every word in every encoder, as `trained` (a state of Adapters) says, or as they began."""
        rows: Rows = {}
        for trigger, encoders in self._first.items():
            own = {
                name: rows_of(first if trained is None else trained[f"{BUNDLED}{trigger}.{name}.direction"], lengths)
                for name, (first, lengths) in encoders.items()
            }
            rows[trigger] = own | self._kept[trigger]
        return rows

    def write(self, lora_name: str, trained: Mapping[str, Tensor]) -> list[Path]:
        """Write the words of a state as embedding files, called like the LoRA file `lora_name` in ComfyUI's folder."""
        return self.write_rows(lora_name, self.rows(trained))

    def write_rows(self, lora_name: str, rows: Rows) -> list[Path]:
        """Write the rows of the words as embedding files, called like the LoRA file `lora_name`."""
        folder, written = folders.embeddings_folder(), []
        for trigger, name in embedding_names(self._words, lora_name).items():
            written.append(embedding_path(folder, name))
            write_atomically(written[-1], tensor_bytes(rows[trigger], {"modelspec.trigger_phrase": trigger}))
        return written

    def remove(self, lora_name: str) -> None:
        """Delete the embedding files that `write` made under this name."""
        folder = folders.embeddings_folder()
        for name in embedding_names(self._words, lora_name).values():
            embedding_path(folder, name).unlink(missing_ok=True)

    def filled(self, text: str, rows: Rows) -> dict:
        """The tokens of a text with the rows in place of trigger words, as ComfyUI's encoders take them."""
        words = list(self._words)

        def own(encoder: str, token: object) -> object:
            if not isinstance(token, Tensor) or token.shape != _MARKER or encoder not in self._readers:
                return token
            word, row = token.int().tolist()
            return rows[words[word]][encoder][row]

        return {
            short: [[(own(name, token), *rest) for token, *rest in chunk] for chunk in chunks]
            for short, chunks in self.tokens(text).items()
            for name in [short if short in self._encoders else f"clip_{short}"]
        }

    def _tokens(self, text: str) -> dict:
        """Tokens with (word, row) in place of each row, made by ComfyUI itself from an embedding file that says so."""
        names = {trigger: f"lora_workbench_{number}" for number, trigger in enumerate(self._words)}
        with TemporaryDirectory(prefix="lora_workbench_") as folder:
            for number, (trigger, name) in enumerate(names.items()):
                counts = {encoder: len(rows) for encoder, rows in self._kept[trigger].items()}
                marks = {
                    encoder: torch.tensor([[number, row] for row in range(counts.get(encoder, self._count))]).float()
                    for encoder in self._tokenizers
                }
                save_file(marks, Path(folder) / f"{name}.safetensors")
            return literal_tokens(self._reading(folder), worded(text, names))

    def _reading(self, folder: str):
        """The CLIP, looking for embeddings in the folder too; the user's own CLIP and tokenizers stay as they are."""
        clip = copy.copy(self._clip)
        clip.tokenizer = copy.copy(clip.tokenizer)
        for name, tokenizer in self._tokenizers.items():
            own = copy.copy(tokenizer)
            there = own.embedding_directory
            own.embedding_directory = [folder, *([there] if isinstance(there, str) else there)]
            setattr(clip.tokenizer, name, own)
        return clip

    def _begun(self, name: str, trigger: str, number: int) -> tuple[Tensor, Tensor]:
        if trigger in self._said:
            return trained_form(self._said[trigger][name].float())
        kind = self._words[trigger]
        if known := self._ids(name, kind) if kind else []:
            return trained_form(first_rows(self._table(name, known), None, None, self._count, None))
        table = self._table(name, range(self._encoders[name].transformer.get_input_embeddings().weight.shape[0]))
        draw = generator(self._seed, f"new token {name}", number)
        return trained_form(first_rows(None, table.mean(dim=0), table.std(dim=0), self._count, draw))

    def _read(self, name: str, word: str) -> Tensor:
        return self._table(name, self._ids(name, word))

    def _ids(self, name: str, words: str) -> list[int]:
        tokenizer = self._tokenizers[name]
        ids = tokenizer.tokenizer(words)["input_ids"]
        return ids[tokenizer.tokens_start : -1 if tokenizer.tokenizer_adds_end_token else None]

    def _table(self, name: str, ids) -> Tensor:
        """Rows of an encoder's table, as it reads them itself: float32, on the CPU."""
        patcher = self._clip.patcher
        with torch.inference_mode():
            mm.load_models_gpu([patcher])
        with torch.inference_mode(False), torch.no_grad():
            places = torch.tensor(list(ids), dtype=torch.long, device=patcher.load_device)
            table = self._encoders[name].transformer.get_input_embeddings()
            return table(places, out_dtype=torch.float32).to("cpu", torch.float32).clone()
