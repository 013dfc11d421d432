"""Text encoders in training: captions as inference reads them, with gradients, and the CLIP as it was afterwards."""

import functools
from contextlib import contextmanager
from types import SimpleNamespace

import cliptoys
import comfy.sd
import hosttoys
import pytest
import torch

from lora_workbench.nodes.host.encoders import GraphEncoder
from lora_workbench.nodes.host.model import LoadedModel
from lora_workbench.nodes.host.text_training import TrainedText
from lora_workbench.training.batches import Batch
from lora_workbench.training.config import KINDS, LORA, LoraConfig, TextConfig, TrainConfig
from lora_workbench.training.embeddings import bundled, embedding_names, worded
from lora_workbench.training.loop import train
from lora_workbench.training.lora import Adapters
from lora_workbench.training.lora_file import file_tensors
from lora_workbench.training.memory import EVERY_BLOCK, NO_BLOCK
from lora_workbench.training.validation import validation_loss

pytestmark = pytest.mark.comfy
both_families = pytest.mark.parametrize("kind", ["sdxl", "flux"])
CAPTIONS = ("a zork on a (blue) background", "a red circle, zork")
LONG = "a star and " * 30 + "a zork"
ENCODERS = TextConfig(encoder_rate=1.0)
TOKENS = TextConfig(new_tokens=2)
BOTH = TextConfig(encoder_rate=0.5, new_tokens=2)
SIZE = (64, 64)

clip_of = functools.cache(hosttoys.clip)  # one for all tests: that training leaves it as it was is one of them
model_of = functools.cache(hosttoys.model)


@pytest.fixture(autouse=True, scope="module")
def _let_go():
    yield
    clip_of.cache_clear()
    model_of.cache_clear()


class Text:
    """A CLIP in training, and what is trained of it."""

    def __init__(self, kind, config=ENCODERS, *, clip=None, lora=None, active=False, recompute=NO_BLOCK):
        self.clip, self.lora, self.recompute = clip or clip_of(kind), lora or LoraConfig(rank=2), recompute
        self.text = TrainedText(self.clip, config, {"zork": "star"}, seed=0)
        vae = SimpleNamespace(patcher=SimpleNamespace(model=torch.nn.Module(), patches={}, backup={}))
        self.encoder = GraphEncoder(model_of(kind), self.clip, vae, self.text.tokens)
        self.adapters = Adapters.build(self.parts(), self.lora, seed=0, extra=self.text.extra())
        if active:
            drawn = torch.randn(self.adapters.values.shape, generator=torch.Generator().manual_seed(9))
            with torch.no_grad():
                self.adapters.values.add_(0.05 * drawn)
        self.attach()

    def parts(self):
        return self.text.parts()

    def attach(self):
        self.text.attach(self.adapters, recompute=self.recompute)

    def batch(self, captions=CAPTIONS, latents=None):
        text = tuple(self.encoder.text(caption) for caption in captions)
        latents = torch.zeros(len(captions), 4, 8, 8) if latents is None else latents
        return Batch(latents, text, SIZE, ("a.png", "b.png")[: len(captions)], captions=tuple(captions))

    @contextmanager
    def adapted(self):
        with torch.inference_mode(False), torch.enable_grad(), self.text.adapted():
            yield

    def live(self, batch):
        with self.adapted():
            return self.text.text_of(batch)

    def file(self):
        state = self.adapters.state()
        tensors = file_tensors(state, self.lora, torch.float32)
        return tensors | (bundled(self.text.tokens.rows(state)) if self.text.tokens else {})


class World(Text):
    """A MODEL and a CLIP in training together."""

    def __init__(self, kind, config=BOTH, **given):
        self.kind, self.config = kind, config
        super().__init__(kind, config, **given)

    def parts(self):
        self.denoiser = LoadedModel(model_of(self.kind), self.text)
        return [hosttoys.part(self.denoiser), *self.text.parts()]

    def attach(self):
        self.denoiser.prepare(self.adapters)

    def trained(self, steps=2, rate=1e-3):
        """The weights after each step of two batches again and again, through the Trainer's own loop."""
        batches = [self.batch(latents=hosttoys.latents(self.kind, 2, SIZE, seed)) for seed in range(2)]
        settings = TrainConfig(steps=steps, learning_rate=rate, text=self.config)
        states = []
        with torch.inference_mode(False):
            for step in train(self.denoiser, batches * steps, self.adapters, settings):
                assert not step.skipped
                states.append(step.snapshot().weights)
        return states


def literal(prompt):
    return prompt.replace("(", r"\(").replace(")", r"\)")


def assert_equal(ours, theirs, tolerance=0.0):
    assert set(ours) == set(theirs)
    for name in theirs:
        torch.testing.assert_close(ours[name].detach(), theirs[name], rtol=tolerance, atol=tolerance)


def moved(prefix, one, other):
    return any(not torch.equal(one[name], other[name]) for name in one if name.startswith(prefix))


@both_families
@pytest.mark.parametrize("config", [ENCODERS, BOTH], ids=["encoders", "new words"])
@pytest.mark.parametrize("captions", [CAPTIONS, (LONG, "")], ids=["short", "long and empty"])
def test_untrained_text_is_the_cached_text_to_the_last_bit(kind, config, captions):
    text = Text(kind, config)
    batch = text.batch(captions)
    for ours, cached in zip(text.live(batch), batch.text, strict=True):
        assert_equal(ours, cached)


@pytest.mark.parametrize("adapter", KINDS)
def test_untrained_text_is_the_cached_text_with_every_kind_of_adapter(adapter):
    text = Text("sdxl", lora=LoraConfig(rank=4, kind=adapter))
    batch = text.batch()
    for ours, cached in zip(text.live(batch), batch.text, strict=True):
        assert_equal(ours, cached, tolerance=1e-5)


@both_families
def test_gradients_reach_every_adapter_of_every_encoder(kind):
    """But those of the last layer of SDXL's CLIP-L, which inference skips too."""
    text = Text(kind, BOTH, active=True)
    batch = text.batch()
    with text.adapted():
        told = text.text.text_of(batch)
        sum((entry["cross_attn"] ** 2).sum() + (entry["pooled_output"] ** 2).sum() for entry in told).backward()
    untouched = {
        adapter.key
        for adapter in text.adapters
        if not all(tensor.grad.abs().max() > 0 for tensor in adapter.tensors.values())
    }
    encoders = {key.partition("text_model")[0] for key in text.adapters.members if key.startswith("lora_")}
    assert encoders == ({"lora_te1_", "lora_te2_"} if kind == "sdxl" else {"lora_te1_"})
    skipped = "lora_te1_text_model_encoder_layers_2_"
    assert untouched == {key for key in text.adapters.members if key.startswith(skipped) and kind == "sdxl"}


@pytest.mark.parametrize(("kind", "recompute"), [("sdxl", NO_BLOCK), ("flux", EVERY_BLOCK)])
def test_gradients_are_those_of_finite_differences(kind, recompute):
    text = Text(kind, BOTH, active=True, recompute=recompute)
    batch = text.batch(CAPTIONS[:1])
    draw = torch.Generator().manual_seed(1)
    towards = {name: torch.randn(value.shape, generator=draw) for name, value in batch.text[0].items()}

    def answer():
        (told,) = text.text.text_of(batch)
        return sum((told[name].double() * towards[name]).sum() for name in towards)

    for prefix in ("lora_te", "bundle_emb"):
        tensors = [t for a in text.adapters if a.key.startswith(prefix) for t in a.tensors.values()]
        text.adapters.zero_grad()
        with text.adapted():
            answer().backward()
            slope = sum(tensor.grad.double().square().sum().item() for tensor in tensors) ** 0.5
            steps = [tensor.grad * (1e-4 / slope) for tensor in tensors]
            ends = []
            with torch.no_grad():
                for sign in (1, -2):
                    for tensor, step in zip(tensors, steps, strict=True):
                        tensor.add_(step, alpha=sign)
                    ends.append(answer().item())
                for tensor, step in zip(tensors, steps, strict=True):
                    tensor.add_(step)
        assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(slope, rel=1e-2)


@pytest.mark.parametrize(("kind", "adapter"), [("flux", LORA), *(("sdxl", kind) for kind in KINDS)])
def test_the_file_gives_the_live_text_through_comfyuis_loader(kind, adapter, caplog):
    text = Text(kind, lora=LoraConfig(rank=4, alpha=2, kind=adapter), active=True)
    batch = text.batch(("a star on a beach",))
    (live,) = text.live(batch)
    _, loaded = comfy.sd.load_lora_for_models(None, text.clip, text.file(), 1.0, 1.0)
    assert "not loaded" not in caplog.text.lower()
    theirs = hosttoys.at_inference(loaded, "a star on a beach")
    for name in theirs:
        change = (theirs[name] - batch.text[0][name]).norm()
        assert change > 0 or (kind == "flux" and name == "cross_attn")
        assert (live[name] - theirs[name]).norm() <= 1e-3 * change


@both_families
def test_the_clip_is_left_as_it_was(kind):
    text = Text(kind, BOTH, active=True)
    batch = text.batch()
    model = text.clip.cond_stage_model
    weights = hosttoys.digest(model.state_dict())
    before = [dict(vars(module)) for module in model.modules()], dict(vars(text.clip))
    with text.adapted():
        sum(entry["pooled_output"].sum() for entry in text.text.text_of(batch)).backward()
    with pytest.raises(RuntimeError, match="stopped"), text.adapted():
        text.text.text_of(batch)
        raise RuntimeError("stopped")
    assert ([vars(module) for module in model.modules()], vars(text.clip)) == before
    assert hosttoys.digest(model.state_dict()) == weights
    assert_equal(text.encoder.text(CAPTIONS[0]), batch.text[0])


@both_families
def test_training_teaches_the_network_the_text_and_the_words(kind, host_folder):
    """And the embedding file is of use at once, in the same process: it says what was trained, bit for bit."""
    world = World(kind)
    batch, first = world.batch(), world.adapters.state()
    weights = hosttoys.digest(world.clip.cond_stage_model.state_dict())
    last = world.trained()[-1]
    taught = ["lora_unet_", "lora_te1_", "bundle_emb.zork.clip_l"]
    taught += ["lora_te2_", "bundle_emb.zork.clip_g"] if kind == "sdxl" else []
    assert all(moved(prefix, first, last) for prefix in taught)
    assert hosttoys.digest(world.clip.cond_stage_model.state_dict()) == weights

    words = World(kind, TOKENS)
    state = words.trained()[-1]
    (path,) = words.text.tokens.write("my run/my run_000002.safetensors", state)
    assert path == host_folder / "models" / "embeddings" / "my_run" / "my_run_000002.safetensors"
    names = embedding_names(words.text.tokens.triggers, "my run/my run_000002.safetensors")
    for caption, ours, begun in zip(CAPTIONS, words.live(batch), batch.text, strict=True):
        assert_equal(ours, hosttoys.at_inference(words.clip, literal(worded(caption, names))))
        assert not torch.equal(ours["pooled_output"], begun["pooled_output"])
    without = words.batch(("a star on a beach",))
    assert_equal(words.live(without)[0], hosttoys.at_inference(words.clip, "a star on a beach"))


@both_families
def test_new_words_alone_learn_what_the_pictures_show(kind):
    """Textual inversion: nothing but the words is trained, and the loss on the same questions falls."""

    class Words(World):
        def parts(self):
            super().parts()
            return []

    words = Words(kind, TOKENS)
    pictures = [words.batch(CAPTIONS[:1], hosttoys.latents(kind, 1, SIZE, seed)) for seed in range(2)]
    before = torch.tensor(validation_loss(words.denoiser, pictures)).mean()
    words.trained(steps=6, rate=3e-3)
    assert all(key.startswith("bundle_emb.") for key in words.adapters.members)
    assert torch.tensor(validation_loss(words.denoiser, pictures)).mean() < before


@both_families
def test_at_rate_0_the_text_encoders_are_out_of_training(kind):
    text = TrainedText(clip_of(kind), TextConfig(encoder_rate=0.0), {}, seed=0)
    assert text.parts() == [] and text.extra() == []


def test_the_text_encoders_stop_learning_at_their_step():
    world = World("flux", TextConfig(encoder_rate=1.0, encoder_stop=0.5))
    states = world.trained(steps=4)
    pairs = list(zip(states, states[1:], strict=False))
    assert [moved("lora_te", *pair) for pair in pairs] == [True, False, False]
    assert [moved("lora_unet", *pair) for pair in pairs] == [True, True, True]


@both_families
def test_the_lora_loader_passes_over_the_bundled_words(kind, caplog):
    """With one line each in the log, as for the files of OneTrainer."""
    text = Text(kind, BOTH, active=True)
    _, loaded = comfy.sd.load_lora_for_models(None, text.clip, text.file(), 1.0, 1.0)
    unread = [record.getMessage() for record in caplog.records if "not loaded" in record.getMessage().lower()]
    encoders = {"sdxl": ["clip_l", "clip_g"], "flux": ["clip_l", "t5xxl"]}[kind]
    assert sorted(unread) == sorted(f"lora key not loaded: bundle_emb.zork.{name}" for name in encoders)
    assert_equal(text.live(text.batch(("a star",)))[0], hosttoys.at_inference(loaded, "a star"), tolerance=1e-3)


def test_the_rates_and_the_end_are_those_of_the_settings():
    config = TextConfig(encoder_rate=0.5, encoder_stop=0.25, new_tokens=1, token_rate=3.0)
    text = TrainedText(clip_of("sdxl"), config, {"zork": ""}, seed=0)
    assert [(part.rate, part.until) for part in text.parts()] == [(0.5, 0.25)] * 2
    assert [(adapter.rate, adapter.until) for adapter in text.extra()] == [(3.0, 1.0)] * 2


def test_a_clip_that_skips_layers_is_trained_as_it_encodes():
    skipping = clip_of("sdxl").clone()
    skipping.clip_layer(-1)
    text = Text("sdxl", clip=skipping)
    batch = text.batch()
    assert_equal(text.live(batch)[0], batch.text[0])
    assert not torch.equal(batch.text[0]["cross_attn"], Text("sdxl").batch().text[0]["cross_attn"])


@both_families
def test_a_clip_with_a_lora_on_is_trained_as_it_is_wired(kind):
    """Also right after another node has used the same weights without it, and the other way round."""
    plain = clip_of(kind)
    _, patched = comfy.sd.load_lora_for_models(None, plain, Text(kind, active=True).file(), 1.0, 1.0)
    for mine, other in ((patched, plain), (plain, patched)):
        text = Text(kind, clip=mine)
        batch = text.batch()
        hosttoys.at_inference(other, "a star")
        for ours, cached in zip(text.live(batch), batch.text, strict=True):
            assert_equal(ours, cached, tolerance=1e-6)
    assert not torch.equal(batch.text[0]["pooled_output"], Text(kind, clip=patched).batch().text[0]["pooled_output"])


def test_captions_that_are_equal_are_read_once():
    text = Text("sdxl")
    first, second = text.live(text.batch(("a zork", "a zork")))
    assert first is second


def test_a_clip_without_encoders_to_train_is_refused_in_one_sentence():
    clip = clip_of("flux").clone()
    clip.cond_stage_model = torch.nn.Module()
    clip.cond_stage_model.t5xxl = clip_of("flux").cond_stage_model.t5xxl
    with pytest.raises(ValueError, match=r"the text encoder t5xxl, and only CLIP-L and CLIP-G are trained: set .*0\.$"):
        TrainedText(clip, ENCODERS, {}, seed=0)


def test_half_precision_text_encoders_are_trained_in_single_precision():
    clip = hosttoys.clip("sdxl")
    with torch.inference_mode():
        clip.cond_stage_model.half()
    text = Text("sdxl", clip=clip)
    batch = text.batch()
    with text.adapted():
        live, _ = text.text.text_of(batch)
        live["cross_attn"].square().sum().backward()
    assert live["cross_attn"].dtype == torch.float32
    assert_equal(live, batch.text[0])
    assert torch.isfinite(text.adapters.values.grad).all() and text.adapters.values.grad.abs().max() > 0


def test_a_batch_in_parts_teaches_the_text_the_same():
    whole, parts = World("flux"), World("flux")
    parts.denoiser.parts = 2
    (one,), (other,) = whole.trained(steps=1), parts.trained(steps=1)
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    ("kind", "encoders"),
    [
        ("sd1", {"lora_te_"}),
        ("sd3", {"lora_te1_", "lora_te2_"}),
        ("sd3 without t5", {"lora_te1_", "lora_te2_"}),
        ("refiner", {"lora_te_"}),
    ],
)
def test_the_text_encoders_of_other_families_are_trained_alike(kind, encoders, caplog, host_folder):
    text = Text("sdxl", BOTH, clip=cliptoys.clip(kind))
    batch = text.batch(("a zork",))
    assert_equal(text.live(batch)[0], batch.text[0])
    for config, prompt in ((ENCODERS, "a zork"), (TOKENS, "a embedding:others")):
        active = Text("sdxl", config, clip=text.clip, active=True)
        (live,) = active.live(active.batch(("a zork",)))
        loaded = text.clip
        if active.text.tokens:
            active.text.tokens.write("others.safetensors", active.adapters.state())
        else:
            assert {key.partition("text_model")[0] for key in active.adapters.members} == encoders
            _, loaded = comfy.sd.load_lora_for_models(None, text.clip, active.file(), 1.0, 1.0)
        theirs = hosttoys.at_inference(loaded, prompt)
        assert not torch.equal(theirs["pooled_output"], batch.text[0]["pooled_output"])
        for name in theirs:
            torch.testing.assert_close(live[name].detach(), theirs[name], rtol=1e-4, atol=1e-4)
    assert "not loaded" not in caplog.text and "does not exist" not in caplog.text
