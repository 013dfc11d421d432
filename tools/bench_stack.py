"""What it takes to put four LoRAs on a mid-size model: our node against a chain of ComfyUI's own."""

from __future__ import annotations

import copy
import gc
import statistics
import time
from pathlib import Path

import torch
from bench_cases import RANK, Case, loaded_model, median_ratio
from safetensors.torch import save_file

LORAS, NODE_ID = 4, "7"
STRENGTHS = (1.0, 0.7, -0.4, 1.15)


def stack_line(size: str, family: str, rounds: int, base: Path) -> dict[str, object]:
    """Both taken in turn: everything anew, and again with one strength changed; CPU seconds, medians and ratios."""
    case = Case(size, family, 1, False, "attention + feed-forward", "cpu")
    model, clip = loaded_model(case), _clip(family)
    names = _write_loras(model, case, base / "models" / "loras")
    sides = {"chained": _Chained, "ours": _Ours, "ours_without_xray": _Plain, "ours_xray_full": _Full}
    times: dict[str, list[float]] = {f"{name}{what}": [] for name in sides for what in ("", "_again")}
    for number in range(rounds + 1):
        for name, side in sides.items():
            gc.collect()
            made = side(unseen(model), clip)
            anew = _seconds(made, names, STRENGTHS)
            again = _seconds(made, names, (0.5, *STRENGTHS[1:]))
            if number:  # the first round warms up
                times[name].append(anew)
                times[f"{name}_again"].append(again)
    return {
        "case": f"{size}-{family}",
        "loras": LORAS,
        **{f"seconds_{name}": round(statistics.median(taken), 4) for name, taken in times.items()},
        **{
            f"{name}_over_chained{what}": median_ratio(times[f"{name}{what}"], times[f"chained{what}"])
            for name in list(sides)[1:]
            for what in ("", "_again")
        },
    }


def unseen(model):
    """The same MODEL, but nothing of what was found out about it and its LoRAs is known yet."""
    fresh = model.clone()
    fresh.model = copy.copy(model.model)
    return fresh


class _Chained:
    """Four Load LoRA nodes; each keeps its file, as ComfyUI lets it."""

    def __init__(self, model, clip) -> None:
        import nodes

        self._model, self._clip = model, clip
        self._loaders = [nodes.LoraLoader() for _ in range(LORAS)]

    def __call__(self, names, strengths):
        model, clip = self._model, self._clip
        for loader, name, strength in zip(self._loaders, names, strengths, strict=True):
            model, clip = loader.load_lora(model, clip, name, strength, strength)
        return model, clip


class _Ours:
    """LoRA Stack Apply with nothing kept from earlier runs, neither files nor findings."""

    xray = "short"

    def __init__(self, model, clip) -> None:
        from comfy_api.latest import io

        from lora_workbench.nodes.host import lora_chain
        from lora_workbench.nodes.stack_apply import LoraWorkbenchStackApply

        lora_chain.SHELF.keep(NODE_ID, ())
        self._inputs = {"model": model, "clip": clip, "xray": self.xray}
        self._node = LoraWorkbenchStackApply.PREPARE_CLASS_CLONE({"hidden_inputs": {io.Hidden.unique_id: NODE_ID}})

    def __call__(self, names, strengths):
        stack = [(name, strength, strength) for name, strength in zip(names, strengths, strict=True)]
        return self._node.EXECUTE_NORMALIZED(lora_stack=stack, **self._inputs).args[:2]


class _Plain(_Ours):
    xray = "off"


class _Full(_Ours):
    xray = "full"


def _seconds(made, names, strengths) -> float:
    """CPU time of one run of the nodes."""
    with torch.inference_mode():
        started = time.process_time()
        made(names, strengths)
        return time.process_time() - started


def _clip(family: str):
    from toyworld.node_pack import text

    with torch.inference_mode():
        return (text.flux_clip if family == "flux" else text.sdxl_clip)(seed=1)


def _write_loras(model, case: Case, folder: Path) -> list[str]:
    """Files with a random LoRA for every layer that is trained, as the Trainer writes them."""
    from lora_workbench.nodes.host.model import LoadedModel
    from lora_workbench.training.config import LoraConfig
    from lora_workbench.training.lora import Adapters, Part
    from lora_workbench.training.lora_file import file_tensors

    denoiser, config = LoadedModel(model), LoraConfig(rank=RANK[case.size], layers=case.layers)
    adapters = Adapters.build([Part("lora_unet_", denoiser.network, denoiser.family.layers)], config, seed=0)
    tensors, names = file_tensors(adapters.state(), config, torch.float16), []
    for number in range(LORAS):
        random = torch.Generator().manual_seed(number)
        drawn = {
            key: tensor if key.endswith(".alpha") else 0.1 * torch.randn(tensor.shape, generator=random).half()
            for key, tensor in tensors.items()
        }
        names.append(f"{case.size}_{case.family}_{number}.safetensors")
        save_file(drawn, folder / names[-1])
    return names
