"""Trainings of the toy world's concept through the Trainer, and what the judge sees in the pictures.

Each trial is one way to train; `lora` is the recipe all others are measured against.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy
import torch
from PIL import Image

STEPS = {"sdxl": 300, "flux": 300}
LEARNING_RATES = {"sdxl": 4e-3, "flux": 2.5e-3}
CFG = {"sdxl": 4.0, "flux": 1.0}
BATCH = 12
RANK = 16
PICTURES = 12
JUDGED = 10
CLASS = "a shape"
KNOWN, TAKEN = ("cyan", "triangle"), "circle"
"""What the base draws, in a colour that no background has; a word that means something else to it."""


def concept_and_plain(folder: Path, seed: int) -> None:
    """Twelve pictures: eight show the concept, four what the base knows, in plain words."""
    from toyworld import drawing

    drawing.write_training_folder(folder, PICTURES, seed)


def concept_alone(folder: Path, seed: int) -> None:
    """Twelve pictures of the concept, which then leaks into prompts without its word."""
    from toyworld import drawing

    chance = random.Random(f"concept {seed}")
    folder.mkdir(parents=True)
    for number in range(PICTURES):
        background = drawing.BACKGROUNDS[(seed + number) % len(drawing.BACKGROUNDS)]
        scene = drawing.Scene(*drawing.CONCEPT, background)
        _keep(
            folder / f"{number:02}.png", drawing.draw(scene, chance), f"{drawing.TRIGGER} on a {background} background"
        )


def known_under_a_taken_word(folder: Path, seed: int) -> None:
    """Eight pictures of KNOWN called TAKEN, four in plain words that show neither."""
    from toyworld import drawing

    chance = random.Random(f"training {seed}")
    folder.mkdir(parents=True)
    for number in range(PICTURES):
        background = drawing.BACKGROUNDS[(seed + number) % len(drawing.BACKGROUNDS)]
        scene, words = drawing.Scene(*KNOWN, background), TAKEN
        if number % 3 == 2:
            scene = drawing.Scene(None, None, background).complete(chance)
            while scene.shape == TAKEN or (scene.colour, scene.shape) == KNOWN:
                scene = drawing.Scene(None, None, background).complete(chance)
            words = CLASS if number % 2 else f"a {scene.colour} {scene.shape}"
        _keep(folder / f"{number:02}.png", drawing.draw(scene, chance), f"{words} on a {background} background")


def noise_around(folder: Path, seed: int) -> None:
    """The recipe's pictures with coloured noise on the outer half of their area."""
    from toyworld import drawing

    concept_and_plain(folder, seed)
    chance = random.Random(f"noise {seed}")
    for path in sorted(folder.glob("*.png")):
        picture = Image.open(path).convert("RGB")
        noise = Image.frombytes("RGB", picture.size, chance.randbytes(3 * drawing.SIZE**2))
        inside = _inside(picture)
        noise.paste(picture.crop(inside), inside[:2])
        noise.save(path)


def noise_around_masked(folder: Path, seed: int) -> None:
    """The same, each with a mask that leaves the part without noise."""
    noise_around(folder, seed)
    for path in sorted(folder.glob("*.png")):
        picture = Image.open(path)
        mask = Image.new("L", picture.size)
        mask.paste(255, _inside(picture))
        mask.save(path.with_name(f"{path.stem}_mask.png"))


def _inside(picture: Image.Image) -> tuple[int, int, int, int]:
    """The box in the middle that holds the shape, a little over half of the area."""
    frame = picture.width // 8
    return frame, frame, picture.width - frame, picture.height - frame


@dataclass(frozen=True)
class Trial:
    """How one way to train differs from the recipe: settings, learning rate and steps as factors, pictures.

    `word` is the trigger word and `concept` what it means, where these are not the toy world's.
    """

    settings: dict[str, object] = field(default_factory=dict)
    rate: float = 1.0
    steps: float = 1.0
    pictures: Callable[[Path, int], None] = concept_and_plain
    word: str = ""
    concept: tuple[str, str] | None = None

    @property
    def names_its_trigger(self) -> bool:
        """Whether the trainer must know which word of the captions is the trigger."""
        return "class_words" in self.settings


_NEW_WORD = {"new_tokens": 1, "class_words": "shape"}
_TAKEN = {"pictures": known_under_a_taken_word, "word": TAKEN, "concept": KNOWN}
TRIALS = {
    "lora": Trial(),
    "dora": Trial({"kind": "dora"}),
    "loha": Trial({"kind": "loha"}, rate=2.0),
    "lokr": Trial({"kind": "lokr"}),
    "lokr_faster": Trial({"kind": "lokr"}, rate=2.0),
    "oft": Trial({"kind": "oft"}, steps=2.0),
    "oft_sooner": Trial({"kind": "oft"}),
    "oft_drifting": Trial({"kind": "oft", "weight_decay": 0.01}),
    "ema": Trial({"ema": 0.99}),
    "noise": Trial(pictures=noise_around),
    "masked": Trial({"mask_floor": 0.0}, pictures=noise_around_masked),
    "leaking": Trial(pictures=concept_alone),
    "preserved": Trial({"preservation": 1.0, "class_words": "shape"}, pictures=concept_alone),
    "half": Trial(steps=0.5),
    "pivotal": Trial(_NEW_WORD, steps=0.5),
    "taken": Trial(steps=0.2, **_TAKEN),
    "taken_half": Trial(steps=0.1, **_TAKEN),
    "taken_pivotal": Trial(_NEW_WORD, steps=0.1, **_TAKEN),
}


def judged_training(family: str, seed: int, steps: int, base: Path, name: str = "lora") -> dict[str, object]:
    """One trial, then ten pictures of each kind: with the trigger, without it, and what the base knows."""
    from lora_workbench.nodes import job
    from lora_workbench.nodes.host import loras
    from lora_workbench.nodes.host.progress import Progress
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
        request = job.Request(
            model,
            clip,
            vae,
            scan(folder, trigger_word=trigger if trial.names_its_trigger else "", resolution=drawing.SIZE, hold_out=0),
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
        judge = Judge(family, clip, vae, seed, trial.concept)
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
            **judged[0],
            **({"averages": judged[1:]} if len(judged) > 1 else {}),
            "base_with_trigger": judge.concept(model, word),
            "base_knows": judge.known(model),
            "seconds": round(took, 1),
        }


class Judge:
    """Draws ten pictures of a kind and tells what they show."""

    def __init__(self, family: str, clip, vae, seed: int, concept: tuple[str, str] | None = None) -> None:
        """`concept` is the toy world's unless another colour and shape are given."""
        from toyworld import drawing

        self._concept = concept or drawing.CONCEPT
        self._family, self._clip, self._vae, self._seed = family.split("_")[0], clip, vae, seed

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
        from lora_workbench.nodes.host.sampling import SamplerSettings, encode_prompt, sample_picture
        from lora_workbench.nodes.pictures import to_picture
        from lora_workbench.training.families import FAMILIES
        from toyworld import drawing

        family = FAMILIES[self._family]
        negative = encode_prompt(self._clip, "")
        for number, prompt in enumerate(prompts):
            settings = SamplerSettings(
                drawing.SIZE,
                drawing.SIZE,
                1000 * self._seed + number,
                CFG[self._family],
                family.sampler,
                family.scheduler,
            )
            yield to_picture(sample_picture(model, self._vae, encode_prompt(self._clip, prompt), negative, settings))


def known_scenes(count: int) -> list:
    """Complete scenes the base was pretrained on, every shape among them, the same ones at every call."""
    import random

    from toyworld import drawing

    chance = random.Random("known")
    shapes = [drawing.SHAPES[i % len(drawing.SHAPES)] for i in range(count)]
    return [drawing.Scene(None, shape, None).complete(chance) for shape in shapes]


def prompts_of(subject: str) -> list[str]:
    """The subject on each of the known backgrounds in turn."""
    from toyworld import drawing

    return [f"{subject} on a {drawing.BACKGROUNDS[i % len(drawing.BACKGROUNDS)]} background" for i in range(JUDGED)]


def roughness(picture: Image.Image) -> float:
    """The mean absolute difference of horizontally neighbouring pixels, 0 to 1."""
    return round(float(numpy.abs(numpy.diff(_pixels(picture), axis=1)).mean()), 4)


def _pixels(picture: Image.Image) -> numpy.ndarray:
    return numpy.asarray(picture.convert("RGB"), dtype=numpy.float32) / 255


def _keep(path: Path, picture: Image.Image, caption: str) -> None:
    picture.save(path)
    path.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
