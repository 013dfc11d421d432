"""Trainings of the toy world's concept through the Trainer, and what the judge sees in the pictures.

The ways to train are in bench_trials.py.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy
import torch
from bench_trials import CLASS, PICTURES, TRIALS
from PIL import Image

STEPS = {"sdxl": 300, "flux": 300}
LEARNING_RATES = {"sdxl": 4e-3, "flux": 2.5e-3}
CFG = {"sdxl": 4.0, "flux": 1.0}
BATCH = 12
RANK = 16
JUDGED = 10


def judged_training(
    family: str, seed: int, steps: int, base: Path, name: str = "lora", cfg: float = 0.0
) -> dict[str, object]:
    """One trial, then ten pictures of each kind: with the trigger, without it, and what the base knows.

    `steps` and `cfg` are the recipe's where they are 0.
    """
    from lora_workbench.nodes import job
    from lora_workbench.nodes.host import loras
    from lora_workbench.nodes.host.progress import Progress
    from lora_workbench.training.dataset import joined
    from lora_workbench.training.embeddings import embedding_names, worded
    from lora_workbench.training.folder import scan
    from lora_workbench.training.presets import ExpertSettings
    from toyworld import drawing
    from toyworld.node_pack import models

    trial = TRIALS[name]
    folder = base / "input" / f"{name}_{family}_{seed}"
    trial.pictures(folder, seed)
    trigger = word = trial.word or drawing.TRIGGER
    with torch.inference_mode():
        model, clip, vae = models.load(family)
        named = trigger if trial.names_its_trigger else ""
        own = scan(folder, trigger_word=named, resolution=drawing.SIZE, hold_out=0, fill_masked=trial.fill_masked)
        request = job.Request(
            model,
            clip,
            vae,
            joined([*(drawn_of_class(family, model, clip, vae, seed) if trial.class_pictures else ()), own]),
            name=folder.name,
            preset="concept",
            steps=round(trial.steps * (steps or STEPS[family])),
            learning_rate=trial.rate * LEARNING_RATES[family],
            rank=RANK,
            save_every=1_000_000,
            preview_prompts=f"{trigger} on a green background",
            seed=seed,
            settings=ExpertSettings(**{"batch_size": BATCH, "schedule": "cosine"} | trial.settings),
        )
        started = time.perf_counter()
        result = job.execute(request, Progress(None))
        took = time.perf_counter() - started
        if trial.settings.get("new_tokens"):
            trigger = worded(trigger, embedding_names([trigger], result.checkpoint.lora_name)).strip()
        judge = Judge(family, clip, vae, seed, trial.concept, cfg)
        entries = [result.checkpoint, *result.run.averages()]
        judged = [
            judge.everything(loras.apply(model, clip, loras.read_lora(Path(entry.path)), 1.0, 1.0)[0], model, trigger)
            | ({"average": entry.average} if entry.average else {})
            for entry in entries
        ]
        return {
            "trial": name,
            "family": family,
            "seed": seed,
            "steps": result.plan.train.steps,
            "cfg": cfg or CFG[family],
            **judged[0],
            **({"averages": judged[1:]} if len(judged) > 1 else {}),
            "base_with_trigger": judge.concept(model, word),
            "base_knows": judge.known(model),
            "seconds": round(took, 1),
        }


def drawn_of_class(family: str, model, clip, vae, seed: int) -> list:
    """Datasets of PICTURES pictures of the class on each background in turn, as LoRA Regularization Images makes them.

    None has the seed of a picture that is judged.
    """
    from lora_workbench.nodes.class_pictures import ClassPictures
    from lora_workbench.nodes.host.progress import Progress

    counts, datasets = Counter(prompts_of(CLASS, PICTURES)), []
    for number, (prompt, count) in enumerate(counts.items()):
        pictures = ClassPictures(
            model, clip, vae, prompt, "", _sampling(family, 500_000 + 1000 * seed + 10 * number, CFG[family])
        )
        pictures.make(count, Progress(None))
        datasets.append(pictures.dataset(count, 1.0))
    return datasets


class Judge:
    """Draws ten pictures of a kind and tells what they show."""

    def __init__(
        self, family: str, clip, vae, seed: int, concept: tuple[str, str] | None = None, cfg: float = 0.0
    ) -> None:
        """`concept` and `cfg` are the toy world's unless another colour and shape, or another one, are given."""
        from toyworld import drawing

        self._concept = concept or drawing.CONCEPT
        self._family, self._clip, self._vae, self._seed = family.split("_")[0], clip, vae, seed
        self._cfg = cfg or CFG[self._family]

    def everything(self, model, base, trigger: str) -> dict[str, float]:
        """Shares of pictures, 0 to 1; how near those with the trigger come to the concept, and how noisy they are; how
        far those of the class drifted from the base's (root mean square).
        """
        from toyworld import judge

        called, plain = (list(self.drawn(model, prompts_of(subject))) for subject in (trigger, CLASS))
        return {
            "with_trigger": self._share(called),
            "score": round(statistics.fmean(judge.concept_score(picture, self._concept) for picture in called), 4),
            "without_trigger": self._share(plain),
            "base_kept": self.known(model),
            "noisy": statistics.fmean(map(roughness, called)),
            "drift": self._drift(plain, base),
        }

    def concept(self, model, subject: str) -> float:
        """The share of pictures of `subject` on known backgrounds that show the concept."""
        return self._share(self.drawn(model, prompts_of(subject)))

    def _share(self, pictures: Iterable[Image.Image]) -> float:
        from toyworld import judge

        return sum(judge.shows(picture, *self._concept) for picture in pictures) / JUDGED

    def known(self, model) -> float:
        """The share of prompts the base knows whose shape, colour and background all come out right."""
        from toyworld import judge

        scenes = known_scenes(JUDGED)
        prompts = [f"a {scene.colour} {scene.shape} on a {scene.background} background" for scene in scenes]
        pictures = self.drawn(model, prompts)
        right = [
            judge.shows(picture, scene.colour, scene.shape, scene.background)
            for picture, scene in zip(pictures, scenes, strict=True)
        ]
        return sum(right) / JUDGED

    def _drift(self, plain: Iterable[Image.Image], base) -> float:
        pairs = zip(plain, self.drawn(base, prompts_of(CLASS)), strict=True)
        return round(statistics.fmean(float(((_pixels(a) - _pixels(b)) ** 2).mean() ** 0.5) for a, b in pairs), 4)

    def drawn(self, model, prompts: list[str]):
        from lora_workbench.nodes.host.sampling import encode_prompt, sample_picture
        from lora_workbench.nodes.pictures import to_picture

        negative = encode_prompt(self._clip, "")
        for number, prompt in enumerate(prompts):
            settings = _sampling(self._family, 1000 * self._seed + number, self._cfg)
            yield to_picture(sample_picture(model, self._vae, encode_prompt(self._clip, prompt), negative, settings))


def _sampling(family: str, seed: int, cfg: float):
    """How all pictures are drawn."""
    from lora_workbench.nodes.host.sampling import SamplerSettings
    from lora_workbench.training.families import FAMILIES
    from toyworld import drawing

    suited = FAMILIES[family]
    return SamplerSettings(drawing.SIZE, drawing.SIZE, seed, cfg, suited.sampler, suited.scheduler)


def known_scenes(count: int) -> list:
    """Complete scenes the base was pretrained on, every shape among them, the same ones at every call."""
    import random

    from toyworld import drawing

    chance = random.Random("known")
    shapes = [drawing.SHAPES[i % len(drawing.SHAPES)] for i in range(count)]
    return [drawing.Scene(None, shape, None).complete(chance) for shape in shapes]


def prompts_of(subject: str, count: int = JUDGED) -> list[str]:
    """The subject on each of the known backgrounds in turn."""
    from toyworld import drawing

    return [f"{subject} on a {drawing.BACKGROUNDS[i % len(drawing.BACKGROUNDS)]} background" for i in range(count)]


def roughness(picture: Image.Image) -> float:
    """The mean absolute difference of horizontally neighbouring pixels, 0 to 1."""
    return round(float(numpy.abs(numpy.diff(_pixels(picture), axis=1)).mean()), 4)


def _pixels(picture: Image.Image) -> numpy.ndarray:
    return numpy.asarray(picture.convert("RGB"), dtype=numpy.float32) / 255
