"""Full-size models with random weights on a CUDA device: they train, within the memory that is promised."""

import gc

import pytest

pytestmark = [pytest.mark.comfy, pytest.mark.gpu]

GIB = 1024**3
LARGEST_OVERHEAD_GIB = {"sdxl": 3.0, "flux": 7.0}
"""Peak of a checkpointed step at 1024 x 1024 beside the weights: activations, adapters, gradients, optimizer."""


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_a_checkpointed_step_fits_beside_the_weights_and_lowers_the_loss(comfyui, family):
    import bench_cases
    import torch

    from lora_workbench.training.families import ATTENTION_AND_FEED_FORWARD

    case = bench_cases.Case("full", family, 1, True, ATTENTION_AND_FEED_FORWARD, "cuda", "bf16")
    model = bench_cases.loaded_model(case)
    before = torch.cuda.memory_allocated()
    step = bench_cases.OurStep(model, case)
    losses = [step() for _ in range(6)]
    peak = bench_cases.peak(step, "cuda") + torch.cuda.memory_allocated() - before
    assert peak <= LARGEST_OVERHEAD_GIB[family] * GIB
    assert all(loss == loss for loss in losses)
    del step
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() - before <= 0.1 * GIB
