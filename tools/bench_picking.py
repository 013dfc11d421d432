"""Trainings of the toy world that stop too early, in time, and far too late, and which of their files the Picker takes.

Every file is judged by the pictures it draws; the Picker sees only losses on four stars that were kept out of training.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from bench_quality import LEARNING_RATES, RANK, Judge

JUDGED = 21
NEAR = 0.95
KEPT_OUT = 4


@dataclass(frozen=True)
class Regime:
    """How long and on what is trained, and what the Picker should say of it afterwards."""

    pictures: int
    steps: int
    rate: float
    schedule: str
    batch: int
    save_every: int
    verdict: str


REGIMES = {
    "under": Regime(12, 60, 0.5, "constant", 12, 6, "still improving"),
    "well": Regime(12, 300, 1.0, "cosine", 6, 30, "levelled off"),
    # Two pictures on one background that no caption names: what is learned for too long is the background.
    "over": Regime(2, 450, 0.75, "constant", 2, 25, "over-trained later"),
}


def write_pictures(folder: Path, regime: Regime, seed: int) -> None:
    """The pictures of a training: mostly the concept on many backgrounds, or twice on one that goes unsaid."""
    few = regime.pictures < KEPT_OUT
    for number in range(regime.pictures):
        background = ("gray", "white", "yellow")[seed % 3] if few else _background(seed + 2 * number)
        plain = not few and number % 3 == 2
        _write(folder, number, background, seed, plain, "" if few else f" on a {background} background")
    for number in range(KEPT_OUT):
        background = _background(seed + 1 + 2 * number)
        _write(folder / "kept out", number, background, seed + 1, False, f" on a {background} background")


def _background(number: int) -> str:
    from toyworld import drawing

    return drawing.BACKGROUNDS[number % len(drawing.BACKGROUNDS)]


def _write(folder: Path, number: int, background: str, seed: int, plain: bool, place: str) -> None:
    from toyworld import drawing

    chance = random.Random(f"{folder.name} {seed} {number}")
    scene = (
        drawing.Scene(None, None, background).complete(chance) if plain else drawing.Scene(*drawing.CONCEPT, background)
    )
    words = f"a {scene.colour} {scene.shape}" if plain else drawing.TRIGGER
    folder.mkdir(parents=True, exist_ok=True)
    drawing.draw(scene, chance).save(folder / f"{number:02}.png")
    (folder / f"{number:02}.txt").write_text(f"{words}{place}\n", encoding="utf-8")


def picked_training(family: str, name: str, seed: int, base: Path) -> dict[str, object]:
    """One training, every file judged, and what the Picker suggests and says."""
    from lora_workbench.nodes import job
    from lora_workbench.nodes.host.progress import Progress
    from lora_workbench.training.presets import ExpertSettings
    from toyworld import drawing
    from toyworld.node_pack import models

    regime, folder = REGIMES[name], base / "input" / f"{name}_{family}_{seed}"
    write_pictures(folder, regime, seed)
    with torch.inference_mode():
        model, clip, vae = models.load(family)
        dataset = dataset_of(folder, folder / "kept out")
        request = job.Request(
            model,
            clip,
            vae,
            dataset,
            name=folder.name,
            preset="concept",
            steps=regime.steps,
            learning_rate=regime.rate * LEARNING_RATES[family],
            rank=RANK,
            save_every=regime.save_every,
            preview_prompts=f"{drawing.TRIGGER} on a green background",
            seed=seed,
            settings=ExpertSettings(batch_size=regime.batch, schedule=regime.schedule),
        )
        result = job.execute(request, Progress(None))
        checkpoints = replace(result.run.result(regime.steps, drawing.TRIGGER), dataset=dataset)
        judge = Judge(family, clip, vae, seed)
        scores = {entry.step: score_of(judge, model, clip, Path(entry.path)) for entry in checkpoints.entries}
        return {"family": family, "regime": name, "seed": seed} | suggested(
            checkpoints, model, clip, vae, scores, regime
        )


def dataset_of(trained: Path, kept_out: Path):
    """The dataset of a folder, with the pictures of another kept out."""
    from lora_workbench.training.folder import scan
    from toyworld import drawing

    train, others = (
        scan(folder, trigger_word=drawing.TRIGGER, resolution=drawing.SIZE, hold_out=0)
        for folder in (trained, kept_out)
    )
    own = tuple(example for example in train.examples if example.path.parent == trained)
    return replace(train, examples=own, held_out=others.examples)


def score_of(judge: Judge, model, clip, path: Path) -> float:
    """How well a file draws what it is asked for, 0 to 1: half for the concept, half for the background."""
    from lora_workbench.nodes.host import loras
    from toyworld import drawing
    from toyworld import judge as toy_judge

    backgrounds = [_background(number) for number in range(JUDGED)]
    adapted, _ = loras.apply(model, clip, loras.read_lora(path), 1.0, 1.0)
    drawn = judge.drawn(adapted, [f"{drawing.TRIGGER} on a {background} background" for background in backgrounds])
    return statistics.fmean(
        0.5 * toy_judge.concept_score(picture) + 0.5 * (toy_judge.read(picture).background == background)
        for picture, background in zip(drawn, backgrounds, strict=True)
    )


def suggested(checkpoints, model, clip, vae, scores: dict[int, float], regime: Regime) -> dict[str, object]:
    """What the Picker takes, how that compares with the best and the last file, and whether its verdict is right."""
    from lora_workbench.nodes import grid, selection
    from lora_workbench.nodes.host.choice import Choice
    from lora_workbench.nodes.host.progress import Progress

    request = selection.Request(model, clip, vae, checkpoints, scope=grid.NOTHING)
    with Choice(None, checkpoints.name) as shown:
        made = selection.execute(request, Progress(None), shown)
    picked, best, last = scores[made.checkpoint.step], max(scores.values()), scores[max(scores)]
    return {
        "picked_step": made.checkpoint.step,
        "picked": round(picked, 3),
        "best_step": max(scores, key=scores.get),
        "best": round(best, 3),
        "last": round(last, 3),
        "within_5_percent": picked >= NEAR * best,
        "verdict": made.decision.kind,
        "verdict_right": made.decision.kind == regime.verdict,
        "notes": list(made.notes),
    }


def table(lines: Sequence[dict]) -> str:
    """The lines as a table for docs/."""
    head = "| model | training | seed | picked | best | last | within 5 % | verdict | right |"
    line_under = "|---" * head.count(" | ") + "|---|"
    rows = [
        f"| {line['family']} | {line['regime']} | {line['seed']} | {line['picked']} (step {line['picked_step']}) | "
        f"{line['best']} (step {line['best_step']}) | {line['last']} | {_said(line['within_5_percent'])} | "
        f"{line['verdict']} | {_said(line['verdict_right'])} |"
        for line in lines
    ]
    return "\n".join([head, line_under, *rows])


def _said(value: bool) -> str:
    return "yes" if value else "**no**"
