"""The example workflows, with a toy model wired in where the user's model would be, and toy sizes."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import workflow

ROOT = Path(__file__).resolve().parents[1]
WORKFLOWS = ROOT / "example_workflows"
PACK = "comfyui-lora-workbench"
PACKS = {PACK: ROOT, "toyworld": ROOT / "tests" / "toyworld" / "node_pack"}
SIZE = 128


@dataclass(frozen=True)
class Family:
    """A model family: its example workflow, its toy loader, and what its toy model needs to be sampled well."""

    name: str
    title: str
    file: str
    loader: str
    cfg: float
    learning_rate: float


FAMILIES = {
    "sdxl": Family("sdxl", "SDXL", "train_pick_generate.json", "ToyWorldSDXL", cfg=4.0, learning_rate=4e-3),
    "flux": Family("flux", "FLUX", "train_pick_generate_flux.json", "ToyWorldFlux", cfg=1.0, learning_rate=2.5e-3),
}


def toy_workflow(
    family: Family, object_info: Mapping, *, folder: str, trigger_word: str, prompt: str, trainer: Mapping[str, Any]
) -> dict:
    """The family's example workflow as a user of the toy model would have filled it in.

    Only the loader is swapped; all other nodes and wires are the example's own. ``trainer`` sets the Trainer's values.
    """
    result = json.loads((WORKFLOWS / family.file).read_text(encoding="utf-8"))
    result = workflow.with_loader(result, family.loader)

    def fill(class_type: str, **values: Any) -> None:
        nonlocal result
        result = workflow.with_values(result, object_info, class_type, **values)

    fill("LoraWorkbenchDatasetLoader", folder=folder, trigger_word=trigger_word, resolution=SIZE)
    fill("LoraWorkbenchTrainer", **{"preview_prompts": prompt, "learning_rate": family.learning_rate, **trainer})
    fill("LoraWorkbenchCheckpointPicker", prompts=prompt, size=SIZE)
    fill("EmptyLatentImage", width=SIZE, height=SIZE)
    fill("KSampler", steps=20, cfg=family.cfg)
    for title in ("Prompt", "Prompt, without the LoRA"):
        node = next(node for node in result["nodes"] if node.get("title") == title)
        node["widgets_values"] = [prompt]
    return result


def with_settings(prompt: dict, object_info: dict, **settings: Any) -> dict:
    """A prompt in API form with a Training Settings node wired to its Trainer; what is not given is the default."""
    name = "LoraWorkbenchTrainingSettings"
    node = {"class_type": name, "inputs": {**workflow.defaults(object_info[name]), **settings}}
    trainers = {key: value for key, value in prompt.items() if value["class_type"] == "LoraWorkbenchTrainer"}
    wired = {key: {**v, "inputs": {**v["inputs"], "settings": ["settings", 0]}} for key, v in trainers.items()}
    return {**prompt, "settings": node, **wired}


def sampling_graph(family: Family, prompt: str, *, lora: str | None = None, seed: int = 0, count: int = 1) -> dict:
    """A graph in API form that makes ``count`` pictures with the toy model, with Load LoRA when ``lora`` is given.

    The pictures are shown by node "images".
    """
    graph = {
        "loader": {"class_type": family.loader, "inputs": {}},
        "positive": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["loader", 1], "text": prompt}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"clip": ["loader", 1], "text": ""}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": SIZE, "height": SIZE, "batch_size": count}},
        "sampler": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["loader", 0],
                "positive": ["positive", 0],
                "negative": ["negative", 0],
                "latent_image": ["latent", 0],
                "seed": seed,
                "steps": 20,
                "cfg": family.cfg,
                "sampler_name": "euler",
                "scheduler": "normal" if family.name == "sdxl" else "simple",
                "denoise": 1.0,
            },
        },
        "decoded": {"class_type": "VAEDecode", "inputs": {"samples": ["sampler", 0], "vae": ["loader", 2]}},
        "images": {"class_type": "PreviewImage", "inputs": {"images": ["decoded", 0]}},
    }
    if lora:
        names = {"model": ["loader", 0], "clip": ["loader", 1], "lora_name": lora}
        strengths = {"strength_model": 1.0, "strength_clip": 1.0}
        graph["lora"] = {"class_type": "LoraLoader", "inputs": {**names, **strengths}}
        graph["sampler"]["inputs"]["model"] = ["lora", 0]
        for node in ("positive", "negative"):
            graph[node]["inputs"]["clip"] = ["lora", 1]
    return graph
