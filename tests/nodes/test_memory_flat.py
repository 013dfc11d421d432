"""Training leaves nothing behind: not from step to step, not when it is cancelled, not when it is done."""

import gc

import comfy.model_management as mm
import hosttoys
import psutil
import pytest
import queueing
import torch

from lora_workbench.nodes.host.memory import give_back_memory
from lora_workbench.nodes.host.model import LoadedModel
from lora_workbench.training.attach import Attachment
from lora_workbench.training.config import TrainConfig
from lora_workbench.training.loop import train
from lora_workbench.training.lora import Adapters

pytestmark = pytest.mark.comfy
CYCLES = 4
MIB = 1024**2
OURS = (Adapters, Attachment, LoadedModel, torch.optim.Optimizer)


def living() -> tuple[int, int, int]:
    """Objects of a training, tensors, and bytes of tensors that are alive."""
    give_back_memory()
    gc.collect()
    ours, tensors, storages = 0, 0, {}
    for thing in gc.get_objects():
        kind = type(thing)
        ours += issubclass(kind, OURS)
        if issubclass(kind, torch.Tensor):
            tensors += 1
            if kind in (torch.Tensor, torch.nn.Parameter):
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return ours, tensors, sum(storages.values())


def resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def cancelled_cycles(trainer: queueing.Trainer, count: int) -> list[tuple[int, int, int, int]]:
    """What lives after each of so many trainings that were cancelled in their third forward pass."""
    seen = []
    for _ in range(count):
        with (
            pytest.raises(mm.InterruptProcessingException),
            queueing.at_forward(trainer.model, 3, queueing.interrupt),
        ):
            trainer.queue(steps=10_000, save_every=5_000)
        seen.append((*living(), resident_bytes()))
    return seen


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_cancelling_and_queueing_again_leaves_memory_flat(kind, tmp_path, monkeypatch):
    trainer = queueing.trainer(kind, tmp_path, monkeypatch, models=queueing.shared_models(kind))
    trainer.queue(steps=2)  # what is made once: caches, optimizers' first import, the encoders' buffers
    before = living()
    seen = cancelled_cycles(trainer, CYCLES)
    assert [cycle[0] for cycle in seen] == [before[0]] * CYCLES
    assert max(cycle[1] for cycle in seen) <= before[1] + 8
    assert max(cycle[2] for cycle in seen) <= before[2] + MIB // 4
    assert seen[-1][1:3] == seen[1][1:3], "something more is kept with every training"


def test_from_step_to_step_nothing_more_is_kept():
    denoiser = hosttoys.loaded(hosttoys.model("flux"))
    adapters = hosttoys.attach(denoiser)
    steps = train(denoiser, hosttoys.Batches("flux"), adapters, TrainConfig(steps=200))
    seen = {}
    for step in steps:
        if step.number in (20, 200):
            del step
            seen[len(seen)] = (len(gc.get_objects()), *living(), resident_bytes())
    (objects, ours, tensors, size, held), (objects_after, ours_after, tensors_after, size_after, held_after) = (
        seen.values()
    )
    assert (ours_after, tensors_after, size_after) == (ours, tensors, size)
    assert abs(objects_after - objects) <= 200
    assert held_after - held <= 16 * MIB


def test_what_a_finished_training_held_is_gone():
    patcher = hosttoys.model("sdxl")
    mm.load_models_gpu([patcher])
    before = living()
    denoiser = hosttoys.loaded(patcher)
    adapters = hosttoys.attach(denoiser)
    for _ in train(denoiser, hosttoys.Batches("sdxl"), adapters, TrainConfig(steps=2)):
        pass
    assert living()[2] > before[2]
    denoiser.release()
    del denoiser, adapters, _
    assert living() == before
