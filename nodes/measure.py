"""Measures LoRA files on a loaded model: the same question to each, with the loader that every user has.

Losses are those of training/validation.py, at the pictures' size in training, with the captions as the CLIP reads them
with the file on. What was measured is kept by content in output/lora_workbench/cache/scores, and never measured twice.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import Tensor

from ..training.batches import Batch, load
from ..training.cache import Cached, encode
from ..training.checkpoint import Validation
from ..training.dataset import Dataset, Example
from ..training.embeddings import bundled_words
from ..training.lora_content import content_of
from ..training.picking import STRENGTHS
from ..training.scores import EFFORTS, Score, is_proper, leak, mean_difference, without_words
from ..training.timesteps import VALIDATION_PLACES
from ..training.validation import validation_loss
from ..training.whole_file import write_atomically
from .class_pictures import ClassPictures
from .host import folders, loras
from .host.encoders import GraphEncoder
from .host.probe import Probe, checked
from .host.progress import Progress, throw_if_cancelled
from .host.sampling import SamplerSettings

FORMAT = 1
"""Part of every key: raise it when losses come to be measured in another way."""
CLASS_PICTURES = 2


class Measure:
    """LoRA files on one MODEL, CLIP and VAE, asked about the same pictures.

    `forwards` counts the noisy pictures that went through the network. Leaving `with Measure(...)` loads the MODEL as
    it is wired again; the weights themselves are only ever patched by ComfyUI.
    """

    def __init__(
        self,
        model,
        clip,
        vae,
        held_out: Sequence[Example],
        training: Sequence[Example],
        effort: str,
        progress: Progress,
        dataset: Dataset | None = None,
    ) -> None:
        """Of each kind of picture the first few held out, and a spread of those trained on, as `effort` says.

        `dataset` says at which resolution and on which background they are shown; it may be None where there are no
        pictures. ValueError with one sentence for a model that cannot be asked.
        """
        try:
            self._bare = Probe(model)
        except ValueError as error:
            raise ValueError(
                f"LoRAs cannot be measured on this model, as none can be trained on it: {error}"
            ) from error
        self._model, self._clip, self._vae, self._progress = model, clip, vae, progress
        self._dataset, self._effort = dataset, EFFORTS[effort]
        self.held_out = tuple(held_out[: self._effort.pictures])
        self.training = tuple(_spread(training, self._effort.pictures))
        self._encoder = GraphEncoder(model, clip, vae)
        device = self._bare.device.type
        self._on = (self._bare.identity, self._encoder.text_key, str(self._bare.dtype), device)
        self._cached: dict[Example, Cached] = {}
        self.forwards = 0

    def __enter__(self) -> Measure:
        return self

    def __exit__(self, *_) -> None:
        if self.forwards:
            self._bare.load()

    def base(self) -> Score:
        """The losses of the model as it is wired, with which every file is compared; ValueError where they are none."""
        score = self._score(self._asked(None, (*self.held_out, *self.training)))
        if score.broken:
            raise ValueError(
                "The model as it is wired answers with values that are not numbers, so nothing can be compared with "
                "it: run it in bf16 or fp32, or load another one."
            )
        return score

    def of(self, path: Path, lora_name: str, strength: float = 1.0, known: Validation | None = None) -> Score:
        """The losses with a file on, at a strength for model and CLIP alike.

        `known` are the losses that the trainer measured of this file, of the held-out pictures in their order; they
        take the place of measuring where they are of the same noise levels.
        """
        broken, effect = self._checked(path)
        if broken:
            return Score(effect=effect, broken=broken)
        asked = self._asked(_Lora(path, lora_name, strength), (*self.held_out, *self.training))
        return replace(self._score(asked, self._fitting(known)), effect=effect)

    def by_strength(self, path: Path, lora_name: str) -> tuple[dict[float, Validation], Validation]:
        """The losses at several strengths, and those of the base: on held-out pictures, on trained ones without any."""
        pictures = self.held_out or self.training
        found = {
            strength: self._losses(self._asked(_Lora(path, lora_name, strength), pictures), pictures)
            for strength in STRENGTHS
        }
        return found, self._losses(self._asked(None, pictures), pictures)

    def without_trigger(self, path: Path | None, lora_name: str = "") -> Score:
        """The same score with the trigger words taken out of the captions; of the base without a path.

        Only the pictures that were held out are asked about, where there are some.
        """
        lora = None if path is None else _Lora(path, lora_name)
        held_out, training = (self._untriggered(some) for some in (self.held_out, self.training))
        asked = self._asked(lora, held_out or training)
        if held_out:
            return Score(held_out=self._losses(asked, held_out))
        return Score(training=self._losses(asked, training))

    def without_captions(self) -> Score:
        """The losses of the model as it is wired, told nothing about the pictures."""
        held_out, training = (tuple(replace(e, caption="") for e in some) for some in (self.held_out, self.training))
        asked = self._asked(None, (*held_out, *training))
        return Score(self._losses(asked, held_out), self._losses(asked, training))

    def leak(self, path: Path, lora_name: str, score: Score | None = None) -> float | None:
        """How much of the gain needs the trigger word: 1 all of it, near 0 none, so that the LoRA is in every picture.

        None where the captions have no trigger word, or nothing was gained.
        """
        pictures = self.held_out or self.training
        if self._untriggered(pictures) == pictures:
            return None
        score = score or self.of(path, lora_name)
        without, base_without = self.without_trigger(path, lora_name), self.without_trigger(None)
        return leak(score, without, self.base(), base_without)

    def drift(self, path: Path, lora_name: str) -> float | None:
        """U = mean of ln(L / L0) over pictures of the class that the model drew by itself: how far the file moves them.

        None where nothing says what the class is.
        """
        prompt = self.class_prompt
        if not prompt or self._dataset is None:
            return None
        pictures = self._drawn(prompt)
        values = self._losses(self._asked(_Lora(path, lora_name), pictures), pictures)
        base = self._losses(self._asked(None, pictures), pictures)
        return mean_difference(values, base) if is_proper(values) and is_proper(base) else None

    @cached_property
    def class_prompt(self) -> str:
        """What the pictures show, in words the model knows: class words, else a caption without the trigger words."""
        examples = (*self.training, *self.held_out)
        told = [example.class_words for example in examples] + [example.caption for example in examples]
        return next(filter(None, (without_words(text, self._triggers) for text in told)), "")

    def _score(self, asked: _Asked, known: Validation | None = None) -> Score:
        held_out = self._losses(asked, self.held_out) if known is None else known
        training = self._losses(asked, self.training)
        if any(losses and not is_proper(losses) for losses in (held_out, training)):
            return Score(broken="its loss is not a number")
        return Score(held_out, training)

    def _fitting(self, known: Validation | None) -> Validation | None:
        """The trainer's losses of the pictures that are asked about; None where it asked about others."""
        if not known or len(known) < len(self.held_out) or self._effort.levels != VALIDATION_PLACES:
            return None
        fitting = [list(levels) for levels in known[: len(self.held_out)]]
        return fitting if all(len(levels) == len(self._effort.levels) for levels in fitting) else None

    def _checked(self, path: Path) -> tuple[str, float | None]:
        """Why a file cannot be used, or "", and its effect."""

        try:
            digest = content_of(path).digest
        except FileNotFoundError:
            return "it is not there", None
        except OSError:
            return "it cannot be read", None
        key = ["file", digest, *self._on[:2]]
        try:
            broken, effect = self._kept(key, lambda: checked(self._bare, self._clip, loras.read_lora(path)))
        except ValueError:  # not kept, since it may be for want of memory
            return "it cannot be read", None
        return broken, effect

    def _asked(self, lora: _Lora | None, pictures: tuple[Example, ...]) -> _Asked:
        return _Asked(self._bare, self._model, self._clip, self._vae, lora, tuple(e.caption for e in pictures))

    def _losses(self, asked: _Asked, pictures: tuple[Example, ...]) -> Validation:
        """The losses of some pictures, measured unless they were before."""
        if not pictures:
            return []
        cached = self._encoded(pictures)
        shown = [[item.latents.name, item.mask and item.mask.name, item.text.name, item.caption] for item in cached]
        key = ["losses", *self._on, asked.key, self._effort.levels, shown]
        return self._kept(key, lambda: self._measured(asked, cached))

    def _measured(self, asked: _Asked, cached: tuple[Cached, ...]) -> Validation:
        texts = asked.texts
        batches = [load([item]) for item in cached]
        probe, levels = asked.probe, self._effort.levels
        largest = max(batches, key=lambda batch: batch.latents.numel()).latents
        self._progress.phase(f"Measuring {asked.name}")
        probe.load_for((len(levels), *largest.shape[1:]))
        before = probe.samples
        try:
            return validation_loss(probe, _told(batches, texts), levels=levels)
        finally:
            self.forwards += probe.samples - before

    def _encoded(self, pictures: tuple[Example, ...]) -> tuple[Cached, ...]:
        """The pictures and their captions in the Trainer's cache."""
        if not self._cached.keys() >= set(pictures):
            self._check_fit()
            # All kinds together, so that the VAE and the text encoders are loaded once.
            wanted = dict.fromkeys((*self.held_out, *self.training, *pictures))
            missing = tuple(example for example in wanted if example not in self._cached)
            folder = folders.cache_folder()
            shown = replace(self._dataset, examples=(), held_out=missing)
            found = encode(shown, self._encoder, folder, self._progress.encoding).held_out
            self._cached.update(zip(missing, found, strict=True))
        return tuple(self._cached[example] for example in pictures)

    def _check_fit(self) -> None:
        """ValueError when VAE or CLIP do not give what the model takes."""
        title, widths = self._bare.family.title, (self._bare.context_width, self._bare.pooled_width)
        key = ["fits", *self._on, self._encoder.latents_key]
        self._kept(key, lambda: self._encoder.check(title, *widths))

    @property
    def _triggers(self) -> tuple[str, ...]:
        told = {example.trigger_word.strip() for example in (*self.held_out, *self.training)}
        if self._dataset is not None:
            told |= {word.strip() for word in self._dataset.trigger_word.split(",")}
        return tuple(sorted(filter(None, told)))

    def _untriggered(self, pictures: tuple[Example, ...]) -> tuple[Example, ...]:
        return tuple(replace(e, caption=without_words(e.caption, self._triggers)) for e in pictures)

    def _drawn(self, prompt: str) -> tuple[Example, ...]:
        """Pictures of the class as the model draws them by itself, at fixed seeds; kept as regularization pictures."""
        settings = SamplerSettings.square(self._bare.family, self._dataset.resolution, seed=0)
        pictures = ClassPictures(self._model, self._clip, self._vae, prompt, "", settings)
        pictures.make(CLASS_PICTURES, self._progress)
        return tuple(Example(path, prompt, settings.width, settings.height) for path in pictures.paths(CLASS_PICTURES))

    def _kept(self, key: list, make: Callable[[], object]) -> object:
        """What is kept under a key, made where nothing is."""
        name = hashlib.sha256(json.dumps([FORMAT, *key]).encode()).hexdigest()
        path = folders.cache_folder() / "scores" / f"{name}.json"
        try:
            return json.loads(path.read_text("utf-8"))["found"]
        except (OSError, ValueError, KeyError, TypeError):
            found = make()
            write_atomically(path, json.dumps({"found": found}).encode())
            return found


@dataclass(frozen=True)
class _Lora:
    """A file, its name in the loaders' list, and how strong it is."""

    path: Path
    name: str
    strength: float = 1.0


class _Asked:
    """The network with a LoRA on, or without one, and what the CLIP then says: each made when it is first needed."""

    def __init__(self, bare: Probe, model, clip, vae, lora: _Lora | None, captions: tuple[str, ...]) -> None:
        self._bare, self._model, self._clip, self._vae = bare, model, clip, vae
        self._lora, self._captions = lora, captions

    @property
    def name(self) -> str:
        return "the untrained model" if self._lora is None else Path(self._lora.name).name

    @cached_property
    def key(self) -> list | None:
        """What tells this apart from other LoRAs; a file with new words is also told by where its embeddings lie."""
        if self._lora is None:
            return None
        content = content_of(self._lora.path)
        return [content.digest, self._lora.strength, self._lora.name if bundled_words(content.names) else ""]

    @cached_property
    def _tensors(self) -> Mapping[str, Tensor]:
        return loras.read_lora(self._lora.path)

    @cached_property
    def _applied(self) -> tuple[object, object]:
        strength = self._lora.strength
        return loras.apply(self._model, self._clip, self._tensors, strength, strength)

    @cached_property
    def probe(self) -> Probe:
        return self._bare if self._lora is None else Probe(self._applied[0])

    @cached_property
    def texts(self) -> dict[str, dict[str, Tensor]]:
        """Caption -> what the text encoders say with the LoRA on; {} where it changes nothing about text."""
        if self._lora is None or not self._lora.strength:
            return {}
        clip = self._applied[1]
        said = loras.text_with(self._tensors, self._lora.name, self._captions)
        if said is None and loras.patched_layers(clip) == loras.patched_layers(self._clip):
            return {}
        encoder = GraphEncoder(self._model, clip, self._vae)
        told = zip(self._captions, said or self._captions, strict=True)
        return {caption: encoder.text(words) for caption, words in dict(told).items()}


def _told(batches: Sequence[Batch], texts: Mapping[str, dict[str, Tensor]]) -> Iterator[Batch]:
    """The batches of one picture each, with other texts for their captions where there are some."""
    for batch in batches:
        throw_if_cancelled()
        (caption,) = batch.captions
        yield replace(batch, text=(texts[caption],)) if caption in texts else batch


def _spread(examples: Sequence[Example], most: int) -> list[Example]:
    """At most `most` of them, evenly spread."""
    count = min(most, len(examples))
    return [examples[number * len(examples) // count] for number in range(count)]
