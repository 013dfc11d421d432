"""A graph whose Picker asks which of a folder's LoRA files to use, and files of random weights for it."""

from pathlib import Path

import example
import hosttoys
import torch
from safetensors.torch import save_file

from lora_workbench.nodes.host.architecture import family_of
from lora_workbench.training import lora_file
from lora_workbench.training.config import LoraConfig


def random_files(folder: Path, names: dict[str, int]) -> None:
    """A LoRA of random weights for the toy SDXL model under each name, drawn from its seed."""
    adapters = hosttoys.attach(hosttoys.loaded(hosttoys.model("sdxl")), active=False)
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed in names.items():
        random = torch.Generator().manual_seed(seed)
        tensors = lora_file.file_tensors(adapters.state(), LoraConfig(rank=2, alpha=1.0), torch.float32)
        for key, tensor in tensors.items():
            if not key.endswith(".alpha"):
                tensors[key] = 0.2 * torch.randn(tensor.shape, generator=random)
        save_file(tensors, folder / f"{name}.safetensors")


def picking_graph(prompt: str, **widgets) -> dict:
    """A graph in API form that draws with what its Picker, which asks, hands on; `widgets` are more of the Picker's."""
    family = family_of(hosttoys.model("sdxl"))
    graph = example.sampling_graph(example.FAMILIES["sdxl"], prompt, seed=5)
    wires = {"model": ["loader", 0], "clip": ["loader", 1], "vae": ["loader", 2]}
    asked = {"pick": "ask me", "at_step": 0, "preference": "balanced", "prompts": prompt, "seed": 5}
    about = {**wires, **asked, "size": example.SIZE, **widgets}
    graph["picker"] = {"class_type": "LoraWorkbenchCheckpointPicker", "inputs": about}
    graph["sampler"]["inputs"] |= {"model": ["picker", 0], "cfg": family.cfg}
    graph["sampler"]["inputs"] |= {"sampler_name": family.sampler, "scheduler": family.scheduler}
    for node in ("positive", "negative"):
        graph[node]["inputs"]["clip"] = ["picker", 1]
    return graph
