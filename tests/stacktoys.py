"""LoRA files of every kind for the toy models, LoRA Stack Apply, and the same by ComfyUI's own nodes."""

from __future__ import annotations

import comfy.lora
import comfy.model_management as mm
import hosttoys
import queueing
import torch
from comfy_api.latest import io
from safetensors.torch import save_file

import nodes
from lora_workbench.nodes.stack_apply import LoraWorkbenchStackApply

KINDS = ("sdxl", "flux")
VERSIONS = {"sdxl": "sdxl_base_v1-0", "flux": "flux1"}
LORA, LOHA, LOKR, DORA = ADAPTERS = ("lora", "loha", "lokr", "dora")
RANK, ALPHA, FACTOR = 3, 1.5, 4


def places(kind):
    """Kohya's name of every layer of MODEL and CLIP -> the shape of its weight."""
    model, clip, _ = queueing.shared_models(kind)
    keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, comfy.lora.model_lora_keys_unet(model.model, {}))
    weights = {**model.model.state_dict(), **clip.cond_stage_model.state_dict()}
    by_weight = {}
    for name, key in keys.items():
        if name.startswith("lora_") and isinstance(key, str) and key in weights and weights[key].ndim in (2, 4):
            by_weight.setdefault(key, name)
    return {name: tuple(weights[key].shape) for key, name in by_weight.items()}


def adapter(kind, shape, random):
    """The tensors of one layer by the ends of their names, large enough to be seen."""

    def drawn(*size):
        return 0.1 * torch.randn(size, generator=random)

    (out, inner), kernel = shape[:2], shape[2:]
    if kind in (LORA, DORA):
        parts = {
            "lora_down.weight": drawn(RANK, inner, *kernel),
            "lora_up.weight": drawn(out, RANK, *(1,) * len(kernel)),
        }
        if kind == DORA:
            parts["dora_scale"] = 1 + drawn(out, 1, *(1,) * len(kernel))
    elif kind == LOHA:
        width = inner * (kernel[0] * kernel[1] if kernel else 1)
        parts = {
            f"hada_w{n}_{side}": drawn(*size)
            for n in (1, 2)
            for side, size in (("a", (out, RANK)), ("b", (RANK, width)))
        }
    else:
        factor = FACTOR if out % FACTOR == inner % FACTOR == 0 else 1
        parts = {"lokr_w1": drawn(factor, factor), "lokr_w2": drawn(out // factor, inner // factor, *kernel)}
    return {**parts, "alpha": torch.tensor(ALPHA)}


def write(folder, name, kind, seed=0, metadata=None, adapters=(LORA,), every=1):
    """A file for every layer (or one in `every`) of model and text encoders, its layers of these kinds in turn."""
    random, tensors = torch.Generator().manual_seed(seed), {}
    for number, (layer, shape) in enumerate(list(places(kind).items())[::every]):
        parts = adapter(adapters[number % len(adapters)], shape, random)
        tensors |= {f"{layer}.{part}": tensor for part, tensor in parts.items()}
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / name, {"ss_base_model_version": VERSIONS[kind]} if metadata is None else metadata)


def execute(model, clip=None, lora_stack=None, *rows, node_id=queueing.NODE_ID, **changes):
    """What the node gives; each row is (name, strength_model, strength_clip) or that and whether it is on."""
    inputs = {}
    for number in range(1, 5):
        row = rows[number - 1] if number <= len(rows) else ("none", 1.0, 1.0)
        for name, value in zip(("lora", "strength_model", "strength_clip", "on"), (*row, True), strict=False):
            inputs[f"{name}_{number}"] = value
    node = LoraWorkbenchStackApply.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: node_id}})
    with torch.inference_mode():
        return node.EXECUTE_NORMALIZED(model=model, clip=clip, lora_stack=lora_stack, **inputs | changes)


def apply(*args, **changes):
    """The same as outputs by name."""
    outputs = LoraWorkbenchStackApply.GET_SCHEMA().outputs
    return dict(zip((output.id for output in outputs), execute(*args, **changes).args, strict=True))


def chained(model, clip, rows):
    """The same by ComfyUI's own nodes."""
    with torch.inference_mode():
        for row in rows:
            model, clip = nodes.LoraLoader().load_lora(model, clip, *row)
    return model, clip


def weights(patcher):
    """All weights as they are once ComfyUI has loaded the model with its patches."""
    with torch.inference_mode():
        mm.load_models_gpu([patcher], force_patch_weights=True)
        return hosttoys.digest(patcher.model.state_dict())
