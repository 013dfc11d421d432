"""The Trainer and the Picker, queued as ComfyUI's executor runs them, on toy models with random weights."""

from __future__ import annotations

import copy
import functools
import hashlib
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import comfy.model_management as mm
import folder_paths
import hosttoys
import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image

import nodes
from lora_workbench.nodes.checkpoint_picker import LoraWorkbenchCheckpointPicker
from lora_workbench.nodes.host.architecture import family_of
from lora_workbench.nodes.host.sampling import PREVIEW_STEPS
from lora_workbench.nodes.trainer import CONTINUE, LoraWorkbenchTrainer
from lora_workbench.training.dataset import Dataset
from lora_workbench.training.folder import scan

RESOLUTION = 64
SEVERAL_BUCKETS = 128
NODE_ID = "7"
SHAPES = ((128, 128), (160, 120), (300, 80), (60, 240))


def run(node, **inputs) -> dict:
    """The node's outputs by name, from an execution in inference mode on a clone of its class that knows its id."""
    clone = node.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: NODE_ID}})
    with torch.inference_mode():
        outputs = clone.EXECUTE_NORMALIZED(**inputs).args
    return dict(zip((output.id for output in node.GET_SCHEMA().outputs), outputs, strict=True))


def draw_folder(folder: Path, pictures: int = 4) -> Path:
    """Pictures of different colours and shapes, each with a caption of its own."""
    folder.mkdir(parents=True)
    for number in range(pictures):
        size = SHAPES[number % len(SHAPES)]
        Image.new("RGB", size, (60 * number % 256, 200 - 40 * number % 200, 90)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"zork, picture {number}", encoding="utf-8")
    return folder


class Counting:
    """What a VAE or a CLIP that was wrapped in a `counted()` copy was asked to encode."""

    def __init__(self) -> None:
        self.pictures: list[tuple[int, ...]] = []
        self.texts: list[str] = []


@dataclass
class Trainer:
    """Models, pictures and the Trainer's inputs; every `queue()` may change some of them."""

    kind: str
    folder: Path
    output: Path
    loras: Path
    model: object
    clip: object
    vae: object
    inputs: dict = field(default_factory=dict)
    asked: Counting = field(default_factory=Counting)

    def dataset(self, **changes) -> Dataset:
        return scan(self.folder, **{"trigger_word": "zork", "resolution": RESOLUTION, "hold_out": 0, **changes})

    def queue(self, **changes) -> dict:
        """The Trainer's outputs."""
        inputs = {
            "model": self.model,
            "clip": self.clip,
            "vae": self.vae,
            "name": "star",
            "preset": "object",
            "steps": 4,
            "learning_rate": 1e-2,
            "rank": 2,
            "save_every": 2,
            "preview_prompts": "",
            "seed": 5,
            "resume": CONTINUE,
            **self.inputs,
            **changes,
        }
        if "dataset" not in inputs:
            inputs["dataset"] = self.dataset()
        self.asked.pictures.clear()
        self.asked.texts.clear()
        return run(LoraWorkbenchTrainer, **inputs)

    def pick(self, trained: dict, **changes) -> dict:
        """The Picker's outputs."""
        inputs = {
            "checkpoints": trained["checkpoints"],
            "model": self.model,
            "clip": self.clip,
            "vae": self.vae,
            "pick": "suggested",
            "at_step": 0,
            "preference": "balanced",
            "prompts": "",
            "seed": 5,
            "size": 64,
            **changes,
        }
        return run(LoraWorkbenchCheckpointPicker, **inputs)

    def lora(self, step: int, name: str = "star") -> Path:
        return self.loras / name / f"{name}_{step:06d}.safetensors"

    def state(self, name: str = "star") -> Path:
        return self.runs / name / "state.safetensors"

    @property
    def runs(self) -> Path:
        return self.output / "lora_workbench" / "runs"

    def files(self) -> dict[str, str]:
        """Every file below the output and loras folders, with its hash."""
        found = [path for top in (self.output, self.loras) for path in top.rglob("*") if path.is_file()]
        return {str(path): sha256(path) for path in found}


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def counted(clip, vae) -> tuple[object, object, Counting]:
    """Copies of a CLIP and a VAE over the same weights that also write down what they are asked."""
    asked, own_clip, own_vae = Counting(), copy.copy(clip), copy.copy(vae)

    def tokenize(text, *args, **kwargs):
        asked.texts.append(text)
        return clip.tokenize(text, *args, **kwargs)

    def encode(pixels):
        asked.pictures.append(tuple(pixels.shape))
        return vae.encode(pixels)

    own_clip.tokenize, own_vae.encode = tokenize, encode
    own_clip.clone = lambda *args, **kwargs: clip.clone(*args, **kwargs)
    return own_clip, own_vae, asked


@contextmanager
def at_forward(patcher, number: int, act, *, training: bool = True):
    """Calls `act` when training, or else sampling, asks the network for the `number`-th time, counted from 1."""
    calls = []

    def before(*_):
        if is_a_step() if training else not (mm.in_training and torch.is_grad_enabled()):
            calls.append(None)
            if len(calls) == number:
                act()

    handle = patcher.model.diffusion_model.register_forward_pre_hook(before)
    try:
        yield
    finally:
        handle.remove()


def is_a_step() -> bool:
    """Whether training asks the network now, and not only tries how a step fits into the memory."""
    frame, callers = sys._getframe(), set()
    while frame is not None:
        callers.add(frame.f_code.co_name)
        frame = frame.f_back
    return mm.in_training and torch.is_grad_enabled() and "preflight" not in callers


def interrupt() -> None:
    """What ComfyUI's cancel button does."""
    mm.interrupt_current_processing(True)


def trainer(kind: str, folder: Path, monkeypatch, *, pictures: int = 4, models: tuple | None = None) -> Trainer:
    """A Trainer in a ComfyUI whose output and loras folders are new; `models` are MODEL, CLIP and VAE to share."""
    output, loras = folder / "output", folder / "loras"
    monkeypatch.setattr(folder_paths, "output_directory", str(output))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(loras)], {".safetensors"}))
    patcher, clip, vae = models or random_models(kind)
    clip, vae, asked = counted(clip, vae)
    return Trainer(kind, draw_folder(folder / "pictures", pictures), output, loras, patcher, clip, vae, asked=asked)


@functools.cache
def shared_models(kind: str) -> tuple:
    """MODEL, CLIP and VAE that are made once for all tests, as nothing may change them."""
    return random_models(kind)


def random_models(kind: str) -> tuple:
    patcher = hosttoys.model(kind)
    return patcher, hosttoys.clip(kind), hosttoys.autoencoder(patcher)


def by_the_graphs_nodes(trainer: Trainer, prompt: str, lora_name: str | None, *, size: int = RESOLUTION) -> np.ndarray:
    """The picture (H, W, 3) in 8 bits that ComfyUI's own nodes make with the settings of previews."""
    family = family_of(trainer.model)
    with torch.inference_mode():
        model, clip = trainer.model, trainer.clip
        if lora_name:
            model, clip = nodes.LoraLoader().load_lora(model, clip, lora_name, 1.0, 1.0)
        (positive,), (negative,) = (nodes.CLIPTextEncode().encode(clip, text) for text in (prompt, ""))
        (latent,) = nodes.EmptyLatentImage().generate(size, size)
        widgets = (5, PREVIEW_STEPS, family.cfg, family.sampler, family.scheduler)
        (samples,) = nodes.KSampler().sample(model, *widgets, positive, negative, latent)
        (pictures,) = nodes.VAEDecode().decode(trainer.vae, samples)
    return np.clip(255.0 * pictures[0].cpu().numpy(), 0, 255).astype(np.uint8)


def portrait(patcher) -> dict:
    """All there is to see of a MODEL without running it, and the modes it runs in."""
    network = patcher.model.diffusion_model
    return {
        "weights": hosttoys.digest(patcher.model.state_dict()),
        "keys": list(patcher.model.state_dict()),
        "parameters": [
            (name, tensor.requires_grad, tensor.grad, tensor.dtype, tensor.device)
            for name, tensor in network.named_parameters()
        ],
        "modules": [(name, type(module), module.training) for name, module in patcher.model.named_modules()],
        "replaced": [name for name, module in network.named_modules() if "forward" in vars(module)],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules()],
        "patches": sorted(patcher.patches),
        "options": repr(patcher.model_options),
        "objects": sorted(patcher.object_patches),
        "modes": (mm.in_training, torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "random": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
    }
