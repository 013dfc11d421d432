"""The three things a benchmark case measures: our training step, ComfyUI's TrainLoraNode, and the floor."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

RANK = {"toy": 4, "mid": 16, "full": 16}
PIXELS = {("toy", "sdxl"): 128, ("toy", "flux"): 128, ("mid", "sdxl"): 512, ("mid", "flux"): 256}
FULL_PIXELS = 1024
TEXT_TOKENS = {"sdxl": 77, "flux": 256}
STORED_AND_COMPUTED = {
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "fp16": (torch.float16, None),
    "fp8": (torch.float8_e4m3fn, torch.bfloat16),
}
WARM_UP_STEPS = 2


@dataclass(frozen=True)
class Case:
    """What is measured: one line of the output."""

    size: str
    family: str
    batch: int
    checkpointing: bool
    layers: str
    device: str
    dtype: str = "fp32"

    @property
    def pixels(self) -> int:
        return PIXELS.get((self.size, self.family), FULL_PIXELS)


def run_case(case: Case, rounds: int, with_trainlora: bool = True) -> dict[str, object]:
    """Time and memory of all three, taken in turn; seconds are medians, ratios are medians of ratios by round."""
    model = loaded_model(case)
    size_of_model = sum(tensor.nbytes for tensor in model.model.diffusion_model.parameters())
    ours, floor = OurStep(model, case), FloorStep(model, case)
    times: dict[str, list[float]] = {"ours": [], "floor": [], "trainlora": []}
    for _ in range(WARM_UP_STEPS):
        ours(), floor()
    for _ in range(rounds):
        times["ours"].append(seconds(ours, case.device))
        times["floor"].append(seconds(floor, case.device))
        if with_trainlora:
            times["trainlora"].append(trainlora_seconds(model, case))
    peaks = {"ours": peak(ours, case.device), "floor": peak(floor, case.device)}
    if with_trainlora:
        peaks["trainlora"] = peak(lambda: trainlora_seconds(model, case), case.device)
    return {
        "case": f"{case.size}-{case.family}",
        "family": case.family,
        "batch": case.batch,
        "checkpointing": case.checkpointing,
        "preset": case.layers,
        "pixels": case.pixels,
        "rank": RANK[case.size],
        "dtype": case.dtype,
        "device": torch.cuda.get_device_name() if case.device == "cuda" else case.device,
        **{f"seconds_{who}": round(statistics.median(taken), 4) if taken else None for who, taken in times.items()},
        "ours_over_floor": median_ratio(times["ours"], times["floor"]),
        "ours_over_trainlora": median_ratio(times["ours"], times["trainlora"]),
        **{f"peak_mb_{who}": round(size / 2**20, 1) for who, size in peaks.items()},
        "adapters_mb": round(ours.adapter_bytes / 2**20, 1),
        "model_mb": round(size_of_model / 2**20, 1),
    }


def median_ratio(above: list[float], below: list[float]) -> float | None:
    """The median of the pairwise ratios, so that a machine that drifts does not bend it."""
    return round(statistics.median(a / b for a, b in zip(above, below, strict=True)), 3) if below else None


def loaded_model(case: Case):
    """The MODEL of a case, loaded as a loader node would leave it."""
    from lora_workbench.nodes.host.model import mm
    from toyworld.node_pack import models

    if case.size == "toy":
        return models.load_model(case.family)
    if case.size == "full":
        return models.full_size(case.family, case.device, *STORED_AND_COMPUTED[case.dtype])
    model = models.mid_size(case.family)
    model.cached_patcher_init = (lambda family, **_: models.mid_size(family), (case.family,))
    mm.load_models_gpu([model])
    return model


def text_of(model, case: Case, number: int) -> dict[str, torch.Tensor]:
    """A random caption, as wide as the model takes it."""
    from lora_workbench.nodes.host.model import LoadedModel

    seen = LoadedModel(model)
    random = torch.Generator().manual_seed(number)
    return {
        "cross_attn": torch.randn(TEXT_TOKENS[case.family], seen.context_width, generator=random),
        "pooled_output": torch.randn(seen.pooled_width, generator=random),
    }


class OurStep:
    """One step of `train()`, as the Trainer runs it, without reading pictures from disk."""

    def __init__(self, model, case: Case, plan=None) -> None:
        """By a memory plan, or by none but the case's checkpointing."""
        from lora_workbench.nodes.host.model import LoadedModel
        from lora_workbench.training.batches import Batch
        from lora_workbench.training.config import LoraConfig, TrainConfig
        from lora_workbench.training.loop import train
        from lora_workbench.training.lora import Adapters, Part
        from lora_workbench.training.memory import EVERY_BLOCK, NO_BLOCK, MemoryPlan

        denoiser = self._denoiser = LoadedModel(model)
        denoiser.load()
        config = LoraConfig(rank=RANK[case.size], layers=case.layers)
        part = Part("lora_unet_", denoiser.network, denoiser.family.layers)
        adapters = self.adapters = Adapters.build([part], config, seed=0)
        denoiser.prepare(adapters, plan or MemoryPlan(recompute=EVERY_BLOCK if case.checkpointing else NO_BLOCK))
        self.adapter_bytes = sum(tensor.nbytes for tensor in adapters.parameters())
        channels = model.model.latent_format.latent_channels
        side = case.pixels // 8
        latents = torch.randn(case.batch, channels, side, side, generator=torch.Generator().manual_seed(1))
        text = tuple(text_of(model, case, number) for number in range(case.batch))
        batch = Batch(latents, text, (case.pixels, case.pixels), ("random",) * case.batch)
        self._steps = train(denoiser, _Always(batch), adapters, TrainConfig(steps=1_000_000))

    def __call__(self) -> float:
        return next(self._steps).loss

    def settle(self, plan) -> None:
        """Go on by another memory plan."""
        self._denoiser.prepare(self.adapters, plan)

    def release(self) -> None:
        """Take everything off the device."""
        self._steps.close()
        self._denoiser.release()

    def loaded_bytes(self) -> int:
        """Of the weights, on the device."""
        return self._denoiser.patcher.loaded_size()


class _Always:
    def __init__(self, batch) -> None:
        self._batch = batch

    def __getitem__(self, number: int):
        return self._batch


class FloorStep:
    """Forward and backward with respect to the input of the bare network, nothing adapted, nothing of ours attached.

    FLUX cannot run backward at all without copies of what it normalises, so the floor has those too.
    """

    def __init__(self, model, case: Case) -> None:
        from lora_workbench.nodes.host.model import LoadedModel

        self._denoiser = LoadedModel(model)
        self._case = case
        side = case.pixels // 8
        shape = (case.batch, model.model.latent_format.latent_channels, side, side)
        self._latents = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(self._denoiser.device)
        self._text = tuple(text_of(model, case, number) for number in range(case.batch))
        self._sigma = torch.full((case.batch,), 0.7, device=self._denoiser.device)

    def __call__(self) -> None:
        import comfy.model_management as mm

        family = self._denoiser.family
        hooks, patched = [], []
        for module in self._denoiser.network.modules():
            if family.adds_in_place and isinstance(module, torch.nn.LayerNorm):
                hooks.append(module.register_forward_pre_hook(lambda _, args: (args[0].clone(),)))
            if self._case.checkpointing and type(module).__name__ in family.blocks:
                module.__dict__["forward"] = _recomputed(module.forward, family.adds_in_place)
                patched.append(module)
        latents = self._latents.clone().requires_grad_()
        mm.in_training = True
        try:
            size = (self._case.pixels, self._case.pixels)
            self._denoiser(latents, self._sigma, self._text, size).square().mean().backward()
        finally:
            mm.in_training = False
            for hook in hooks:
                hook.remove()
            for module in patched:
                del module.__dict__["forward"]


def _recomputed(forward: Callable, copies: bool) -> Callable:
    def own(value):
        if isinstance(value, dict):
            return dict(value)
        return value.clone() if copies and isinstance(value, torch.Tensor) else value

    def run(*args, **kwargs):
        return forward(*map(own, args), **{name: own(value) for name, value in kwargs.items()})

    return lambda *args, **kwargs: checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def trainlora_seconds(model, case: Case) -> float:
    """Seconds of one step of ComfyUI's TrainLoraNode at its defaults, but in the model's own precision.

    With its default checkpoint depth "checkpointing" recomputes the whole model. The node is run for three steps and
    the time between the first and the last optimizer step counts.
    """
    from comfy_extras.nodes_train import TrainLoraNode
    from torch.optim.optimizer import register_optimizer_step_post_hook

    side = case.pixels // 8
    channels = model.model.latent_format.latent_channels
    latents = torch.randn(case.batch, channels, side, side, generator=torch.Generator().manual_seed(1))
    texts = [text_of(model, case, number) for number in range(case.batch)]
    positive = [[text["cross_attn"][None], {"pooled_output": text["pooled_output"][None]}] for text in texts]
    precision = {"fp32": "fp32", "bf16": "bf16"}.get(case.dtype, "none")
    moments: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: moments.append(now(case.device)))
    settings = dict(
        batch_size=case.batch,
        steps=3,
        grad_accumulation_steps=1,
        learning_rate=0.0005,
        rank=RANK[case.size],
        optimizer="AdamW",
        loss_function="MSE",
        seed=0,
        training_dtype=precision,
        lora_dtype="bf16" if case.dtype == "bf16" else "fp32",
        quantized_backward=False,
        algorithm="LoRA",
        gradient_checkpointing=True,
        checkpoint_depth=1,
        offloading=False,
        existing_lora="[None]",
        bucket_mode=False,
        bypass_mode=False,
    )
    try:
        inputs = {name: [value] for name, value in settings.items()}
        TrainLoraNode.execute(model=[model], latents=[{"samples": latents}], positive=[positive], **inputs)
    finally:
        hook.remove()
    return (moments[-1] - moments[0]) / (len(moments) - 1)


def seconds(step: Callable[[], object], device: str) -> float:
    """How long a step takes."""
    started = now(device)
    step()
    return now(device) - started


def now(device: str) -> float:
    """Wall time once the GPU is done, or this process's CPU time."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def peak(step: Callable[[], object], device: str) -> int:
    """Most bytes that live at once during a step beside what lived before it."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    from lora_workbench.nodes.host.memory import LiveBytes

    with LiveBytes() as live:
        step()
    return live.most
