"""One training of the toy world's concept through the Trainer, and what the judge sees in the pictures."""

from __future__ import annotations

import time
from pathlib import Path

import torch

STEPS = {"sdxl": 300, "flux": 300}
LEARNING_RATES = {"sdxl": 4e-3, "flux": 2.5e-3}
CFG = {"sdxl": 4.0, "flux": 1.0}
BATCH = 12
RANK = 16
PICTURES = 12
JUDGED = 10


def judged_training(family: str, seed: int, steps: int, base: Path) -> dict[str, object]:
    """Train on twelve pictures, then draw ten of each kind: with the trigger, without it, and what the base knows."""
    from lora_workbench.nodes import job
    from lora_workbench.nodes.host import loras
    from lora_workbench.nodes.host.progress import Progress
    from lora_workbench.training.folder import scan
    from lora_workbench.training.presets import ExpertSettings
    from toyworld import drawing
    from toyworld.node_pack import models

    folder = base / "input" / f"{family}_{seed}"
    drawing.write_training_folder(folder, PICTURES, seed)
    with torch.inference_mode():
        model, clip, vae = models.load(family)
        request = job.Request(
            model,
            clip,
            vae,
            scan(folder, resolution=drawing.SIZE, hold_out=0),
            name=f"{family}_{seed}",
            preset="concept",
            steps=steps or STEPS[family],
            learning_rate=LEARNING_RATES[family],
            rank=RANK,
            save_every=1_000_000,
            preview_prompts=f"{drawing.TRIGGER} on a green background",
            seed=seed,
            settings=ExpertSettings(batch_size=BATCH, schedule="cosine"),
        )
        started = time.perf_counter()
        result = job.execute(request, Progress(None))
        took = time.perf_counter() - started
        trained = loras.apply(model, clip, loras.read_lora(Path(result.checkpoint.path)), 1.0, 1.0)[0]
        judge = Judge(family, clip, vae, seed)
        return {
            "family": family,
            "seed": seed,
            "steps": result.plan.train.steps,
            "with_trigger": judge.concept(trained, drawing.TRIGGER),
            "without_trigger": judge.concept(trained, "a shape"),
            "base_kept": judge.known(trained),
            "base_with_trigger": judge.concept(model, drawing.TRIGGER),
            "base_knows": judge.known(model),
            "seconds": round(took, 1),
        }


class Judge:
    """Draws ten pictures of a kind and counts what they show."""

    def __init__(self, family: str, clip, vae, seed: int) -> None:
        self._family, self._clip, self._vae, self._seed = family.split("_")[0], clip, vae, seed

    def concept(self, model, subject: str) -> float:
        """The share of pictures of `subject` on known backgrounds that show the concept."""
        from toyworld import drawing, judge

        backgrounds = [drawing.BACKGROUNDS[i % len(drawing.BACKGROUNDS)] for i in range(JUDGED)]
        prompts = [f"{subject} on a {background} background" for background in backgrounds]
        return sum(map(judge.shows_concept, self._draw(model, prompts))) / JUDGED

    def known(self, model) -> float:
        """The share of prompts the base knows whose shape, colour and background all come out right."""
        from toyworld import judge

        scenes = known_scenes(JUDGED)
        prompts = [f"a {scene.colour} {scene.shape} on a {scene.background} background" for scene in scenes]
        pictures = self._draw(model, prompts)
        right = [
            judge.shows(picture, scene.colour, scene.shape, scene.background)
            for picture, scene in zip(pictures, scenes, strict=True)
        ]
        return sum(right) / JUDGED

    def _draw(self, model, prompts: list[str]):
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
