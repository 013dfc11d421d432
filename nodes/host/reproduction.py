"""From a LoRA file alone to the graph that trains it again."""

from __future__ import annotations

import json
from pathlib import Path

from ...training.config import LOKR
from ...training.description import OURS, read, settings_of

TRAINER, SETTINGS = "LoraWorkbenchTrainer", "LoraWorkbenchTrainingSettings"


def workflow_of(path: Path, name: str | None = None) -> dict[str, dict]:
    """The graph in API form, which ComfyUI queues and opens, that trains the LoRA of this file again.

    It holds all that was derived, so that other defaults change nothing; `name` is what to call the new LoRA. The
    models and the pictures must be where they were. ValueError when the file does not say how it was made.
    """
    entries = read(path)
    settings = settings_of(entries)
    try:
        graph = json.loads(entries[f"{OURS}workflow"])
        trainer = graph[entries[f"{OURS}node"]]["inputs"]
        trainer |= _resolved(settings)
        if expert := _expert_settings(trainer, graph):
            expert |= _resolved_by_kind(settings)
        trainer["resume"] = "continue"
        if name is not None:
            trainer["name"] = name
        if trainer.get("stop_after"):
            _settle_time_box(trainer, graph, settings)
    except (LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"The LoRA file '{path.name}' does not hold the graph it was trained in: take the graph from a preview "
            "of its run, or train without ComfyUI's option --disable-metadata."
        ) from error
    return graph


def _resolved(settings: dict) -> dict:
    """The Trainer's inputs of which 0 would mean "derive"."""
    train, lora = settings.get("train", {}), settings.get("lora", {})
    values = {
        "steps": train.get("steps"),
        "learning_rate": train.get("learning_rate"),
        "rank": lora.get("rank"),
        "save_every": settings.get("save_every"),
        "seed": train.get("seed"),
    }
    return {name: value for name, value in values.items() if value is not None}


def _resolved_by_kind(settings: dict) -> dict:
    """The expert settings that preset or kind of adapter decide where they are left alone."""
    train, lora = settings.get("train", {}), settings.get("lora", {})
    # Earlier versions had no lokr_factor, and divided near the square root.
    values = {
        "timesteps": train.get("objective", {}).get("timesteps"),
        "weight_decay": train.get("weight_decay"),
        "lokr_factor": lora.get("lokr_factor", -1) if lora.get("kind") == LOKR else None,
    }
    return {name: value for name, value in values.items() if value is not None}


def _settle_time_box(trainer: dict, graph: dict, settings: dict) -> None:
    """A run that was cut to fit a time has its length by now; another speed must not cut it again."""
    trainer["stop_after"] = 0.0
    if expert := _expert_settings(trainer, graph):
        expert["warmup"] = settings["train"]["warmup"]


def _expert_settings(trainer: dict, graph: dict) -> dict | None:
    """The inputs of the LoRA Training Settings node that is wired to the Trainer."""
    link = trainer.get("settings")
    node = graph.get(str(link[0])) if isinstance(link, list) else None
    return node["inputs"] if node and node["class_type"] == SETTINGS else None
