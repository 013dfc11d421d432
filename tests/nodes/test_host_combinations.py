"""Settings of adapters as users combine them: what was trained is what ComfyUI's loader makes of the file."""

import random

import hosttoys
import pytest
import torch
from hostanswers import denoised_by_comfyui, denoised_by_us

from lora_workbench.nodes.host import loras
from lora_workbench.training import lora_file
from lora_workbench.training.config import ADAFACTOR, ADAMW, KINDS, LAYER_PRESETS, LION, LoraConfig, TrainConfig
from lora_workbench.training.loop import train
from lora_workbench.training.lora import Adapters
from lora_workbench.training.memory import MemoryPlan

pytestmark = pytest.mark.comfy
LEAST_EFFECT = 1e-3


def drawn_settings(kind, draw):
    """One of several million combinations."""
    rank = draw.choice([1, 3, 8, 40])
    lora = LoraConfig(
        rank=rank,
        alpha=draw.choice([0, 0.5, 2.0 * rank]),
        layers=draw.choice(list(LAYER_PRESETS)),
        kind=kind,
        rank_stabilized=draw.random() < 0.5,
        conv_rank=draw.choice([0, 2, 6]),
        include=draw.choice(["", "emb_layers|modulation", "img_in|label_emb", "skip_connection|final_layer.linear"]),
        exclude=draw.choice(["", "to_k", "mlp", "double_blocks.0|input_blocks.1"]),
        ranks=draw.choice(["", "attn = 2", "to_q = 5\nto_v = 0", "linear2 = 1\nin_layers = 4\nff = 33"]),
        dropout=draw.choice([0, 0.3]),
        max_norm=draw.choice([0, 0.3]),
    )
    train = TrainConfig(
        steps=3,
        learning_rate=draw.choice([1e-2, 3e-2]),
        optimizer=draw.choice([ADAMW, LION, ADAFACTOR]),
        lora_plus=draw.choice([1, 8]),
        rates=draw.choice(["", "attn = 3", "to_k = 0\nmlp = 2"]),
    )
    return lora, train


def base_of(model, storage):
    """A MODEL that keeps its weights so, and one for the file whose weights are the same numbers in float32."""
    exact = hosttoys.model(model)
    if storage is None:
        return exact, exact
    stored = hosttoys.model(model, storage=storage, compute=torch.float32)
    with torch.inference_mode():
        for name, weight in exact.model.diffusion_model.named_parameters():
            weight.copy_(stored.model.diffusion_model.get_parameter(name).to(torch.float32))
    return stored, exact


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_combined_the_file_does_what_the_training_did(kind, seed):
    draw = random.Random(f"{kind} {seed}")
    model, (lora, config) = ("sdxl", "flux")[seed % 2], drawn_settings(kind, draw)
    patcher, exact = base_of(model, draw.choice([None, torch.float8_e4m3fn, torch.bfloat16]))
    denoiser = hosttoys.loaded(patcher)
    adapters = Adapters.build([hosttoys.part(denoiser)], lora, seed=seed)
    denoiser.prepare(adapters, MemoryPlan())
    assert not any(step.skipped for step in train(denoiser, hosttoys.Batches(model), adapters, config))
    noisy, sigma, entry = hosttoys.latents(model, 1), hosttoys.levels(model, 1), hosttoys.caption(model)
    live = denoised_by_us(denoiser, noisy, sigma, [entry])
    bare = denoised_by_comfyui(exact, model, noisy, sigma, entry)
    with_file, _ = loras.apply(exact, None, lora_file.file_tensors(adapters.state(), lora, torch.float32), 1.0, 0.0)
    loaded = denoised_by_comfyui(with_file, model, noisy, sigma, entry)
    assert (live - bare).norm() > LEAST_EFFECT * bare.norm(), (lora, config)
    assert (loaded - live).norm() < 1e-3 * (live - bare).norm(), (lora, config)
