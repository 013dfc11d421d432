"""A training fits by itself: plans are tried before they are kept, weights stream, and all of it is given back."""

import gc
import weakref
from types import SimpleNamespace

import comfy.model_management as mm
import comfy.ops
import hosttoys
import pytest
import torch

from lora_workbench.nodes.host import loras, memory, weights
from lora_workbench.nodes.host.memory import OUT_OF_MEMORY, Choices, LiveBytes, choices_for, free_bytes, needs_of
from lora_workbench.training.config import KINDS, LORA, LoraConfig
from lora_workbench.training.lora import Adapters
from lora_workbench.training.lora_file import file_tensors
from lora_workbench.training.memory import EVERY_BLOCK, EVERY_SECOND_BLOCK, NO_BLOCK, RECOMPUTE, MemoryPlan

pytestmark = pytest.mark.comfy
both_families = pytest.mark.parametrize("kind", ["sdxl", "flux"])
GIB = 1024**3
NOISE_LEVELS = 64 * 1024
"""The tables of noise levels, which are no weights and never leave the device."""


def needs(denoiser, adapters):
    return needs_of(denoiser, adapters.values.numel(), hosttoys.SIZE, 2, "adamw", averaged=False)


def passing(denoiser, kind):
    """A forward and backward of two pictures, in as many parts as the plan says."""

    def backward():
        entries = [hosttoys.caption(kind), hosttoys.caption(kind, 1)]
        noisy, sigma = hosttoys.latents(kind), hosttoys.levels(kind)
        for rows in torch.arange(2).tensor_split(denoiser.parts):
            with denoiser.adapted():
                answer = denoiser(noisy[rows], sigma[rows], [entries[row] for row in rows], hosttoys.SIZE)
                (answer.square().flatten(1).mean(1).sum() / 2).backward()

    return backward


def prepared(kind, plan=None, patcher=None):
    denoiser = hosttoys.loaded(patcher or hosttoys.model(kind))
    adapters = hosttoys.attach(denoiser)
    denoiser.prepare(adapters, plan or MemoryPlan())
    return denoiser, adapters


def gradient(kind, plan, patcher=None):
    denoiser, adapters = prepared(kind, plan, patcher)
    adapters.zero_grad()
    passing(denoiser, kind)()
    return adapters.values.grad.clone(), denoiser


def assert_same_gradient(found, expected):
    assert expected.norm() > 0 and found.isfinite().all()
    assert (found - expected).norm() <= 1e-3 * expected.norm()


# Every plan learns the same


@both_families
@pytest.mark.parametrize("plan", list(Choices(2))[1:], ids=str)
def test_no_plan_changes_the_gradient(kind, plan):
    expected, _ = gradient(kind, MemoryPlan())
    found, _ = gradient(kind, plan)
    assert_same_gradient(found, expected)


@both_families
@pytest.mark.parametrize("adapters", KINDS)
def test_with_every_kind_of_adapter_recomputing_changes_no_gradient(kind, adapters):
    """Dropout drops the same in the second run; plain LoRA without it goes through the fused layers."""
    config = LoraConfig(kind=adapters, rank=2, conv_rank=2, dropout=0.0 if adapters == LORA else 0.2)
    denoiser = hosttoys.loaded(hosttoys.model(kind))
    built = Adapters.build([hosttoys.part(denoiser)], config, seed=0)
    found = {}
    for recompute in RECOMPUTE:
        denoiser.prepare(built, MemoryPlan(recompute=recompute))
        if not found:
            drawn = torch.randn(built.values.shape, generator=torch.Generator().manual_seed(3))
            built.values.data.add_(0.02 * drawn)
        built.zero_grad()
        with built.dropping(0, 7):
            passing(denoiser, kind)()
        found[recompute] = built.values.grad.clone()
    for recompute in RECOMPUTE[1:]:
        assert_same_gradient(found[recompute], found[NO_BLOCK])


def kept_bytes(kind, recompute):
    denoiser, _ = prepared(kind, MemoryPlan(recompute=recompute))
    with LiveBytes() as live:
        passing(denoiser, kind)()
    return live.most


@both_families
def test_the_more_is_recomputed_the_less_lives_at_once(kind):
    kept = [kept_bytes(kind, recompute) for recompute in RECOMPUTE]
    assert kept[0] > kept[1] > kept[2]
    assert kept[2] < 0.6 * kept[0]


# Weights that stream


@pytest.fixture
def streams(monkeypatch):
    """Weights that a partial load left off the device are read into a buffer that is overwritten once given back."""
    taken = {"now": 0, "most": 0, "all": 0}
    cast, uncast = comfy.ops.cast_bias_weight, comfy.ops.uncast_bias_weight

    def is_off_the_device(layer):
        return getattr(layer, "comfy_patched_weights", True) is False

    def read(layer, *args, **kwargs):
        weight, bias, ticket = cast(layer, *args, **{**kwargs, "offloadable": True})
        if is_off_the_device(layer):
            weight, bias = weight.clone(), None if bias is None else bias.clone()
            taken["now"] += 1
            taken["all"] += 1
            taken["most"] = max(taken["most"], taken["now"])
        return weight, bias, ticket

    def give_back(layer, weight, bias, ticket):
        if is_off_the_device(layer):
            taken["now"] -= 1
            weight.fill_(torch.nan)
            if bias is not None:
                bias.fill_(torch.nan)
        uncast(layer, weight, bias, ticket)

    ready = weights._is_ready
    monkeypatch.setattr(weights, "_is_ready", lambda layer, *args: not is_off_the_device(layer) and ready(layer, *args))
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", read)
    monkeypatch.setattr(comfy.ops, "uncast_bias_weight", give_back)
    return taken


@both_families
@pytest.mark.parametrize("resident", [0.75, 0.5, 0.25, 0.0])
@pytest.mark.parametrize("recompute", [NO_BLOCK, EVERY_BLOCK])
def test_the_resident_share_falls_as_stated_and_the_gradient_stays(kind, resident, recompute, streams):
    expected, _ = gradient(kind, MemoryPlan(recompute=recompute))
    assert streams["all"] == 0
    found, denoiser = gradient(kind, MemoryPlan(recompute=recompute, resident=resident))
    size, loaded = denoiser.patcher.model_size(), denoiser.patcher.loaded_size()
    assert loaded <= resident * size + NOISE_LEVELS
    assert loaded >= resident * size - 0.15 * size
    assert_same_gradient(found, expected)
    assert streams["all"] > 0 and streams["now"] == 0
    assert streams["most"] == 1, "a weight was kept while another was read"


@both_families
def test_weights_with_another_lora_on_them_stream_as_well(kind, streams):
    state = hosttoys.attach(hosttoys.loaded(hosttoys.model(kind))).state()
    config = LoraConfig(rank=3, alpha=1.5)
    patched, _ = loras.apply(hosttoys.model(kind), None, file_tensors(state, config, torch.float32), 0.7, 1.0)
    expected, _ = gradient(kind, MemoryPlan(), patched)
    found, denoiser = gradient(kind, MemoryPlan(resident=0.25), patched)
    assert denoiser.patcher.loaded_size() <= 0.25 * denoiser.patcher.model_size()
    assert_same_gradient(found, expected)


@both_families
def test_after_streaming_the_weights_are_those_they_were(kind):
    patcher = hosttoys.model(kind)
    before = hosttoys.digest(patcher.model.state_dict())
    _, denoiser = gradient(kind, MemoryPlan(resident=0.25), patcher)
    assert hosttoys.digest(patcher.model.state_dict()) == before
    denoiser.release()
    assert hosttoys.digest(patcher.model.state_dict()) == before
    assert not [name for name, module in patcher.model.named_modules() if getattr(module, "comfy_cast_weights", False)]


def test_a_preview_in_between_does_not_bring_the_weights_back_for_good():
    denoiser, _ = prepared("sdxl", MemoryPlan(resident=0.5))
    mm.load_models_gpu([denoiser.patcher])
    assert denoiser.patcher.loaded_size() > 0.5 * denoiser.patcher.model_size()
    denoiser.load()
    assert denoiser.patcher.loaded_size() <= 0.5 * denoiser.patcher.model_size()


@both_families
def test_comfyui_is_asked_for_the_room_that_the_plan_takes(kind, monkeypatch):
    denoiser, adapters = prepared(kind)
    asked = []
    monkeypatch.setattr(mm, "load_models_gpu", lambda models, memory_required=0: asked.append(memory_required))
    plan, needed = MemoryPlan(recompute=EVERY_SECOND_BLOCK, resident=0.5), needs(denoiser, adapters)
    denoiser.prepare(adapters, plan, needed)
    assert asked == [needed.peak(plan) - needed.weights // 2] and asked[0] > needed.adapters
    denoiser.load()
    assert asked[1] == asked[0]


def test_where_comfyui_pages_weights_by_itself_it_is_asked_for_room_alone(monkeypatch):
    denoiser, adapters = prepared("sdxl")
    patcher, asked = denoiser.patcher, []
    monkeypatch.setattr(mm, "load_models_gpu", lambda models, memory_required=0: asked.append(memory_required))
    monkeypatch.setattr(patcher, "is_dynamic", lambda: True, raising=False)
    monkeypatch.setattr(patcher, "partially_unload", lambda *_: pytest.fail("took residency out of ComfyUI's hands"))
    denoiser.prepare(adapters, MemoryPlan(resident=0.25), needs(denoiser, adapters))
    assert asked and asked[0] > 0


# The plan is tried first


class Foreign(torch.Tensor):
    """A tensor of another pack, as the GGUF pack has them, which can be made of nothing but what that pack knows."""

    def __new__(cls, values, *, kind):
        return super().__new__(cls, values)

    def __init__(self, values, *, kind):
        super().__init__()


def test_counting_bytes_keeps_no_pack_from_turning_its_own_tensors_into_plain_ones():
    foreign = Foreign(torch.ones(3), kind="F32")
    with LiveBytes():
        assert type(torch.Tensor(foreign)) is torch.Tensor


@both_families
def test_the_preflight_measures_a_step_and_changes_no_adapter(kind):
    denoiser, adapters = prepared(kind)
    before, needed = adapters.values.detach().clone(), needs(denoiser, adapters)
    measured = memory.preflight(denoiser, adapters, passing(denoiser, kind), Choices(2, resident=(1.0,)), needed)
    assert torch.equal(adapters.values, before)
    assert not adapters.values.grad.any()
    assert measured.plan == MemoryPlan() and measured.notes == ()
    assert measured.seconds > 0
    state = 16 * adapters.values.numel()
    activations = measured.peak_bytes - denoiser.patcher.model_size() - state
    assert 0 < activations < GIB
    assert measured.needs.peak(measured.plan) == pytest.approx(measured.peak_bytes, abs=16)


def test_what_is_measured_is_what_a_step_takes():
    """Against the count of bytes saved for backward, which is less than what lives at the worst moment."""
    denoiser, adapters = prepared("sdxl")
    saved: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        passing(denoiser, "sdxl")()
    needed = needs(denoiser, adapters)
    measured = memory.preflight(denoiser, adapters, passing(denoiser, "sdxl"), Choices(resident=(1.0,)), needed)
    activations = measured.peak_bytes - needed.weights - needed.adapters
    assert 0.8 * sum(saved.values()) <= activations <= 2 * sum(saved.values())


@pytest.fixture
def little_memory(monkeypatch):
    """A device with so many bytes for everything."""

    def have(size):
        monkeypatch.setattr(memory, "free_bytes", lambda patcher: int(size))

    return have


@both_families
def test_a_prediction_that_was_too_low_is_corrected_by_the_measurement(kind, little_memory):
    denoiser, adapters = prepared(kind)
    needed = needs(denoiser, adapters)
    roomy = memory.preflight(denoiser, adapters, passing(denoiser, kind), Choices(resident=(1.0,)), needed)
    little_memory(needed.weights + needed.adapters + 0.75 * (roomy.peak_bytes - needed.weights - needed.adapters))
    wrong = memory.replace(needed, activations=0)
    measured = memory.preflight(denoiser, adapters, passing(denoiser, kind), Choices(resident=(1.0,)), wrong)
    assert measured.plan.recompute != NO_BLOCK
    assert measured.peak_bytes < roomy.peak_bytes


@both_families
def test_a_prediction_that_was_too_high_is_corrected_as_well(kind, little_memory):
    denoiser, adapters = prepared(kind)
    little_memory(GIB)
    wrong = memory.replace(needs(denoiser, adapters), activations=100 * GIB)
    measured = memory.preflight(denoiser, adapters, passing(denoiser, kind), Choices(2, resident=(1.0,)), wrong)
    assert measured.plan == MemoryPlan()


def out_of_memory_until(denoiser, backward, enough):
    tried = []

    def run():
        tried.append(denoiser._plan)
        if not enough(denoiser._plan):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        backward()

    return run, tried


@both_families
def test_out_of_memory_steps_down_and_says_which_knob_moved(kind):
    denoiser, adapters = prepared(kind)
    run, tried = out_of_memory_until(
        denoiser, passing(denoiser, kind), lambda plan: plan.parts == 2 and plan.recompute == EVERY_SECOND_BLOCK
    )
    measured = memory.preflight(denoiser, adapters, run, Choices(2, resident=(1.0,)), needs(denoiser, adapters))
    assert measured.plan == MemoryPlan(2, EVERY_SECOND_BLOCK)
    assert measured.notes == (
        "Out of memory: the batch now goes through the model in 2 parts.",
        "Out of memory: every second block is now recomputed in backward.",
    )
    assert denoiser.parts == 2 and not adapters.values.grad.any()
    assert list(dict.fromkeys(tried)) == list(Choices(2))[:3]


def test_when_nothing_fits_one_sentence_says_what_to_do():
    denoiser, adapters = prepared("sdxl")
    run, tried = out_of_memory_until(denoiser, None, lambda plan: False)
    choices = choices_for(denoiser.patcher, 2)
    with pytest.raises(MemoryError, match="does not fit into .* GB .*: lower the dataset's resolution") as error:
        memory.preflight(denoiser, adapters, run, choices, needs(denoiser, adapters))
    assert str(error.value).endswith(".") and "\n" not in str(error.value)
    assert tried == list(choices)


def test_cancelling_the_preflight_leaves_no_gradient_behind():
    denoiser, adapters = prepared("sdxl")
    backward = passing(denoiser, "sdxl")

    def cancelled():
        backward()
        raise mm.InterruptProcessingException

    with pytest.raises(mm.InterruptProcessingException):
        memory.preflight(denoiser, adapters, cancelled, Choices(resident=(1.0,)), needs(denoiser, adapters))
    assert not adapters.values.grad.any()


def test_out_of_memory_is_known_by_its_own_name_and_nothing_else_is_taken_for_it():
    assert any(issubclass(torch.OutOfMemoryError, kind) for kind in OUT_OF_MEMORY)
    assert not any(issubclass(kind, OUT_OF_MEMORY) for kind in (ValueError, RuntimeError, KeyboardInterrupt))


FULL = (
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "HIP error: out of memory",
    "MPS backend out of memory (MPS allocated: 17.9 GB, other allocations: 1.1 GB, max allowed: 18.1 GB).",
    "Could not allocate tensor with 67108864 bytes. There is not enough GPU video memory available!",
    "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 67108864 bytes.",
)


@pytest.mark.parametrize("message", FULL)
def test_a_full_device_is_known_by_what_it_says_in_a_step_and_while_loading(message, monkeypatch):
    def full(*_, **__):
        raise RuntimeError(message)

    denoiser, _ = prepared("flux")
    with pytest.raises(OUT_OF_MEMORY), denoiser.adapted():
        full()
    assert not mm.in_training
    monkeypatch.setattr(mm, "load_models_gpu", full)
    with pytest.raises(OUT_OF_MEMORY):
        denoiser.load()


def test_another_failure_of_a_step_stays_what_it_is():
    denoiser, _ = prepared("flux")
    with pytest.raises(RuntimeError, match="sizes do not fit") as failure, denoiser.adapted():
        raise RuntimeError("the sizes do not fit")
    assert not isinstance(failure.value, OUT_OF_MEMORY)


# What is free


def test_on_a_cpu_weights_do_not_stream_and_count_once():
    patcher = hosttoys.model("sdxl")
    assert choices_for(patcher, 3).resident == (1.0,) and choices_for(patcher, 3).batch == 3
    assert free_bytes(patcher) == pytest.approx(mm.get_free_memory(patcher.load_device), rel=0.05)


def test_on_a_gpu_what_comfyui_would_unload_counts_as_free(monkeypatch):
    class Held:
        def __init__(self, size, device):
            self.size, self.device = size, torch.device(device)

        def model_loaded_memory(self):
            return self.size

    patcher = hosttoys.model("sdxl")
    patcher.load_device = torch.device("cuda", 0)
    monkeypatch.setattr(mm, "get_free_memory", lambda device: 2 * GIB)
    monkeypatch.setattr(mm, "current_loaded_models", [Held(3 * GIB, "cuda:0"), Held(5 * GIB, "cpu")])
    assert free_bytes(patcher) == 5 * GIB - mm.extra_reserved_memory()
    assert choices_for(patcher, 1).resident[-1] == 0.0
    patcher.offload_device = patcher.load_device  # --highvram and --gpu-only leave nothing to stream from
    assert choices_for(patcher, 1).resident == (1.0,)


class Loaded:
    """A model as ComfyUI holds it: paged by aimdo, or made of tensors."""

    def __init__(self, size, paged):
        self.size, self.is_dynamic, self.device, self.model = size, lambda: paged, torch.device("cuda", 0), self

    def is_clone(self, other):
        return other is self

    def model_loaded_memory(self):
        return self.size

    def model_size(self):
        return self.size


@pytest.mark.parametrize("paged", [False, True])
def test_the_peak_on_a_gpu_is_this_trainings_alone_whoever_holds_the_weights(paged, monkeypatch):
    """Weights in pages are no part of what torch's allocator counts, neither ours nor other models'."""
    own, text, tensors, pages = (
        Loaded(7 * GIB, paged),
        Loaded(GIB, paged),
        Loaded(2 * GIB, False),
        Loaded(3 * GIB, True),
    )
    monkeypatch.setattr(mm, "current_loaded_models", [own, text, tensors, pages])
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    weights_in_tensors = 0 if paged else (7 * GIB) // 2 + GIB
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 5 * GIB + 2 * GIB + weights_in_tensors)
    denoiser = SimpleNamespace(
        device=own.device, patcher=own, patchers=[own, text], is_ours=lambda model: model in (own, text)
    )
    plan = MemoryPlan(resident=0.5)
    assert memory._peak_of(lambda: None, denoiser, None, plan) == (5 + 3.5 + 1) * GIB


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.bfloat16, torch.float32], ids=str)
def test_the_estimate_counts_weights_as_they_are_stored(storage):
    patcher = hosttoys.model("sdxl", storage=storage, compute=torch.float32)
    denoiser, adapters = prepared("sdxl", patcher=patcher)
    parameters = sum(parameter.numel() for parameter in denoiser.network.parameters())
    found = needs(denoiser, adapters)
    assert found.weights == pytest.approx(parameters * storage.itemsize, rel=0.05)
    assert found.largest_layer == max(p.numel() for p in denoiser.network.parameters()) * 4


# Given back


@both_families
def test_release_takes_everything_off_the_device_and_prepare_brings_it_back(kind):
    denoiser, adapters = prepared(kind)
    passing(denoiser, kind)()
    expected = adapters.values.grad.clone()
    attachment = weakref.ref(denoiser._attachment)
    denoiser.release()
    assert denoiser.patcher.loaded_size() == 0
    assert not [held for held in mm.current_loaded_models if denoiser.patcher.is_clone(held.model)]
    gc.collect()
    assert attachment() is None
    denoiser.prepare(adapters, MemoryPlan())
    adapters.zero_grad()
    passing(denoiser, kind)()
    assert torch.equal(adapters.values.grad, expected)


def test_release_also_gives_back_the_buffers_that_weights_streamed_through(monkeypatch):
    class Stream:
        def synchronize(self):
            pass

    monkeypatch.setattr(mm, "STREAM_CAST_BUFFERS", {Stream(): torch.empty(1024)})
    denoiser, _ = prepared("flux")
    denoiser.release()
    assert not mm.STREAM_CAST_BUFFERS


def test_release_leaves_other_models_where_they_are():
    other = hosttoys.model("flux")
    mm.load_models_gpu([other])
    denoiser, _ = prepared("sdxl")
    denoiser.release()
    assert other.loaded_size() > 0
