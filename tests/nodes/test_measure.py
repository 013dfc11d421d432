"""LoRA files measured on toy models: the same question to each, exactly, and never twice."""

from dataclasses import replace

import hosttoys
import pytest
import queueing
import torch
from safetensors.torch import save_file

from lora_workbench.nodes.host import folders, loras
from lora_workbench.nodes.host.patches import key_map
from lora_workbench.nodes.host.probe import Probe
from lora_workbench.nodes.host.progress import Progress
from lora_workbench.nodes.measure import Measure
from lora_workbench.training.batches import load
from lora_workbench.training.cache import encode
from lora_workbench.training.config import LoraConfig
from lora_workbench.training.lora_file import file_tensors
from lora_workbench.training.scores import Score, agree, differences
from lora_workbench.training.validation import validation_loss

pytestmark = pytest.mark.comfy
LAYERS = ("middle_block.1.transformer_blocks.0.attn1.to_q", "middle_block.1.transformer_blocks.0.ff.net.2")
FLUX_LAYERS = ("double_blocks.0.img_mlp.0", "single_blocks.1.linear2")


class World:
    """A toy model with its pictures, and LoRA files for it."""

    def __init__(self, kind, folder, monkeypatch, pictures=4, hold_out=2, models=None):
        self.trainer = queueing.trainer(
            kind, folder, monkeypatch, pictures=pictures, models=models or queueing.shared_models(kind)
        )
        self.model, self.clip, self.vae = self.trainer.model, self.trainer.clip, self.trainer.vae
        self.dataset = self.trainer.dataset(hold_out=hold_out)
        self.layers = FLUX_LAYERS if kind == "flux" else LAYERS

    def measure(self, effort="quick", model=None, clip=None, dataset=None):
        dataset = dataset or self.dataset
        pictures = dataset.held_out, dataset.concepts
        model, clip = model or self.model, clip or self.clip
        return Measure(model, clip, self.vae, *pictures, effort, Progress(None), dataset)

    def factors(self, seed=0, size=0.3, rank=2):
        """Weight -> (up, down) of a LoRA on two layers."""
        random = torch.Generator().manual_seed(seed)
        weights = dict(self.model.model.diffusion_model.named_parameters())
        shapes = {layer: weights[f"{layer}.weight"].shape for layer in self.layers}
        return {
            f"diffusion_model.{layer}.weight": (
                size * torch.randn(shape[0], rank, generator=random),
                torch.randn(rank, shape[1], generator=random),
            )
            for layer, shape in shapes.items()
        }

    def names(self, prefix):
        """Weight -> the name that ComfyUI's loader knows it by, beginning with one of the prefixes."""
        known = key_map(self.model, None)
        return {
            weight: next(name for name, key in known.items() if key == weight and name.startswith(prefix))
            for weight in self.factors()
        }

    def lora(self, name="a", seed=0, size=0.3, form="kohya", alpha=None):
        """A written file of the factors in another tool's words; the effect is the same in all of them."""
        prefix, up_name, down_name = FORMS[form]
        tensors = {}
        for weight, key in self.names(prefix).items():
            up, down = self.factors(seed, size)[weight]
            if alpha is not None:
                up, tensors[f"{key}.alpha"] = up * len(down) / alpha, torch.tensor(float(alpha))
            tensors |= {f"{key}.{up_name}": up.contiguous(), f"{key}.{down_name}": down.contiguous()}
        return self.write(name, tensors)

    def text_lora(self):
        """A file that changes the first text encoder alone."""
        keys = {n: key for n, key in key_map(self.model, self.clip).items() if n.startswith("lora_te1_text_model")}
        name_of, key = next((n, key) for n, key in keys.items() if n.endswith("0_mlp_fc1"))
        rows, columns = self.clip.cond_stage_model.state_dict()[key].shape
        random = torch.Generator().manual_seed(3)
        up, down = torch.randn(rows, 2, generator=random), torch.randn(2, columns, generator=random)
        return self.write("text", {f"{name_of}.lora_up.weight": up, f"{name_of}.lora_down.weight": down})

    def write(self, name, tensors):
        path = self.trainer.loras / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path)
        return path, path.name

    def forget(self):
        """Delete what was kept."""
        for path in (folders.output_folder() / "lora_workbench" / "cache" / "scores").glob("*.json"):
            path.unlink()


FORMS = {
    "kohya": ("lora_unet_", "lora_up.weight", "lora_down.weight"),
    "diffusers": (("unet.", "transformer."), "lora_B.weight", "lora_A.weight"),
    "diffusers of old": (("unet.", "transformer."), "lora.up.weight", "lora.down.weight"),
    "comfyui": ("diffusion_model.", "lora_B.weight", "lora_A.weight"),
}


@pytest.fixture
def world(request, tmp_path, monkeypatch, comfyui):
    kind = request.param if hasattr(request, "param") else "sdxl"
    return World(kind, tmp_path, monkeypatch)


every_prediction = pytest.mark.parametrize("world", hosttoys.KINDS, indirect=True)


@every_prediction
def test_scores_repeat_to_the_bit_and_are_exactly_the_base_s_at_strength_0(world):
    Probe(world.model).load()  # what an earlier test left patched into the weights is out
    before = hosttoys.digest(world.model.model.state_dict())
    with world.measure() as measure:
        base, file = measure.base(), measure.of(*world.lora())
        at_zero = measure.of(*world.lora(), strength=0.0)
    assert hosttoys.digest(world.model.model.state_dict()) == before and not world.model.patches
    assert at_zero.held_out == base.held_out and at_zero.training == base.training
    assert differences(at_zero.held_out, base.held_out) == [0.0, 0.0]
    assert all(abs(change) > 1e-3 for change in differences(file.held_out, base.held_out))
    assert len(file.training) == 2 and file.effect > 0 and not file.broken
    world.forget()
    torch.rand(3)
    with world.measure() as again:
        assert again.of(*world.lora()) == file and again.base() == base
    assert again.forwards == 32


@pytest.mark.parametrize("world", ["sdxl", "flux"], indirect=True)
def test_the_loader_s_file_scores_as_the_trainer_measured_its_adapters(world):
    """So figures of the trainer may stand beside figures of files."""
    config = LoraConfig(rank=3, alpha=1.5)
    with torch.inference_mode(False):
        denoiser = hosttoys.loaded(world.model)
        adapters = hosttoys.attach(denoiser, rank=3, alpha=1.5)
        measure = world.measure()
        cached = encode(world.dataset, measure._encoder, world.trainer.output / "lora_workbench" / "cache")
        known = validation_loss(denoiser, [load([picture]) for picture in cached.held_out])
    file = world.write("trained", file_tensors(adapters.state(), config, torch.float32))
    found = measure.of(*file)
    assert agree(found.held_out, known)
    assert all(abs(change) < 1e-5 for change in differences(found.held_out, known))
    assert all(change > 1e-3 for change in differences(measure.base().held_out, known)), "it does something"


def test_a_lora_on_the_wired_model_stays_on_for_base_and_files_alike(world):
    other, file = world.lora("other", seed=7), world.lora()
    wired, _ = loras.apply(world.model, None, loras.read_lora(other[0]), 0.8, 0.0)
    both, _ = loras.apply(wired, None, loras.read_lora(file[0]), 1.0, 0.0)
    with world.measure(model=wired) as measure:
        base, scored = measure.base(), measure.of(*file)
    assert base.held_out == world.measure().of(*other, strength=0.8).held_out
    assert scored.held_out == world.measure(model=both).base().held_out != base.held_out


def test_a_base_in_fp8_is_measured_as_it_is_loaded_with_the_file(tmp_path, monkeypatch, comfyui):
    patcher = hosttoys.model("sdxl", storage=torch.float8_e4m3fn, compute=torch.float32)
    models = patcher, queueing.shared_models("sdxl")[1], hosttoys.autoencoder(patcher)
    world = World("sdxl", tmp_path, monkeypatch, models=models)
    file = world.lora()
    with world.measure() as measure:
        base, scored, at_zero = measure.base(), measure.of(*file), measure.of(*file, strength=0.0)
    assert at_zero.held_out == base.held_out != scored.held_out
    world.forget()
    with world.measure() as again:
        assert again.of(*file) == scored and again.base() == base


def test_captions_are_read_by_the_text_encoders_with_the_file_on(world):
    path, name = world.text_lora()
    _, clip = loras.apply(world.model, world.clip, loras.read_lora(path), 1.0, 1.0)
    scored, base = world.measure().of(path, name), world.measure().base()
    assert scored.effect > 0 and scored.held_out != base.held_out
    assert scored.held_out == world.measure(clip=clip).base().held_out
    assert world.measure().of(path, name, strength=0.0).held_out == base.held_out


@pytest.mark.parametrize(("effort", "forwards"), [("quick", 16), ("standard", 32), ("thorough", 96)])
def test_a_checkpoint_costs_what_the_table_says_and_the_base_as_much_once(
    effort, forwards, tmp_path, monkeypatch, comfyui
):
    world = World("sdxl", tmp_path, monkeypatch, pictures=18, hold_out=9)
    went_through = []
    hook = world.model.model.diffusion_model.register_forward_pre_hook(
        lambda _, args: went_through.append(len(args[0]))
    )
    try:
        measure = world.measure(effort)
        measure.base()
        assert sum(went_through) == measure.forwards == forwards
        measure.of(*world.lora())
        measure.base()
        measure.of(*world.lora("copy"))
        assert sum(went_through) == measure.forwards == 2 * forwards, "the base once, equal files once"
    finally:
        hook.remove()


def test_queueing_again_measures_nothing_and_a_change_only_what_it_touches(world):
    file = world.lora()
    first = world.measure()
    base, scored = first.base(), first.of(*file)
    again = world.measure()
    assert (again.base(), again.of(*file), again.forwards) == (base, scored, 0)
    changed = world.measure(dataset=replace(world.dataset, held_out=_recaptioned(world.dataset.held_out)))
    assert changed.of(*file).training == scored.training
    assert changed.forwards == 8, "the captions of two pictures are others"
    assert world.measure().of(*file, strength=0.5) != scored


def test_everything_is_encoded_before_the_network_is_asked_and_nothing_twice(world):
    asked, when_asked = world.trainer.asked, []
    hook = world.model.model.diffusion_model.register_forward_pre_hook(
        lambda *_: when_asked.append((len(asked.pictures), len(asked.texts)))
    )
    try:
        measure = world.measure()
        measure.base()
        measure.of(*world.lora())
    finally:
        hook.remove()
    captions, fitting = 4, 1
    assert set(when_asked) == {(4, captions + fitting)} and len(when_asked) == 8


def test_a_damaged_figure_in_the_cache_is_measured_anew(world):
    base = world.measure().base()
    for path in (world.trainer.output / "lora_workbench" / "cache" / "scores").glob("*.json"):
        path.write_text("{", encoding="utf-8")
    assert world.measure().base() == base


def test_what_the_trainer_measured_of_the_same_pictures_and_levels_is_not_measured_again(world):
    file, known = world.lora(), [[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]
    quick = world.measure()
    assert quick.of(*file, known=known).held_out == known and quick.forwards == 8
    thorough = world.measure("thorough")
    assert len(thorough.of(*file, known=known).held_out[0]) == 6, "asked at other levels"
    assert world.measure().of(*file, known=known[:1]).held_out != known[:1], "of other pictures"


@pytest.mark.parametrize("world", ["sdxl", "flux"], indirect=True)
def test_files_in_the_words_of_other_trainers_score_the_same_with_and_without_alpha(world):
    measure = world.measure()
    scores = {
        (form, alpha): measure.of(*world.lora(f"{form} {alpha}", form=form, alpha=alpha))
        for form in FORMS
        for alpha in (None, 1.0)
    }
    expected = scores["kohya", None]
    assert not expected.broken and expected.held_out != measure.base().held_out
    for told, score in scores.items():
        assert all(abs(change) < 1e-5 for change in differences(score.held_out, expected.held_out)), told
        assert score.effect == pytest.approx(expected.effect, rel=1e-5), told


def test_a_file_that_cannot_be_used_says_why_and_costs_nothing(world):
    (path, name), other = world.lora("whole"), World.write
    tensors = loras.read_lora(path)
    first = next(key for key in tensors if "lora_up" in key)
    files = {
        "it cannot be read": path.with_name("unreadable.safetensors"),
        "it is not there": path.with_name("missing.safetensors"),
        f"it holds values that are not numbers, such as in '{first}'": other(
            world, "nan", {**tensors, first: tensors[first] * torch.nan}
        )[0],
        "it has learned nothing: it changes no weight": other(
            world, "zero", {key: 0 * tensor if "lora_up" in key else tensor for key, tensor in tensors.items()}
        )[0],
        "none of its layers fits this model": other(world, "alien", {"lora_unet_x.lora_up.weight": torch.ones(2)})[0],
    }
    files["it cannot be read"].write_bytes(b"no LoRA")
    measure = world.measure()
    for why, file in files.items():
        found = measure.of(file, file.name)
        assert found.broken == why and not found.held_out and not found.training
    assert measure.forwards == 0
    assert not measure.of(path, name).broken


def test_losses_that_are_no_numbers_make_a_file_broken(world):
    assert world.measure().of(*world.lora("huge", size=1e30)).broken == "its loss is not a number"


def test_without_pictures_only_the_file_itself_is_looked_at(world):
    measure = Measure(world.model, world.clip, world.vae, (), (), "standard", Progress(None))
    scored = measure.of(*world.lora())
    assert measure.base() == Score() and not scored.held_out and scored.effect > 0
    assert measure.forwards == 0 and measure.drift(*world.lora()) is None and measure.leak(*world.lora()) is None


def test_the_trigger_word_is_taken_out_of_the_captions_for_base_and_file(world):
    measure, file = world.measure(), world.lora()
    plain = replace(
        world.dataset, held_out=_recaptioned(world.dataset.held_out, lambda text: text.removeprefix("zork, "))
    )
    unworded = world.measure(dataset=plain)
    assert measure.without_trigger(*file).held_out == unworded.of(*file).held_out != measure.of(*file).held_out
    assert measure.without_trigger(None).held_out == unworded.base().held_out
    assert unworded.leak(*file) is None, "no caption has a trigger word"


def test_drift_is_how_far_pictures_of_the_class_move_that_the_model_drew_by_itself(world):
    measure = world.measure()
    assert measure.class_prompt.startswith("picture ")
    drift = measure.drift(*world.lora())
    assert drift != 0 and drift == world.measure().drift(*world.lora())
    assert measure.forwards == 16, "two pictures, base and file"


def test_strengths_are_compared_on_held_out_pictures_alone(world):
    measure, file = world.measure(), world.lora()
    found, base = measure.by_strength(*file)
    assert list(found) == [0.25, 0.5, 0.75, 1.0, 1.25] and base == measure.base().held_out
    assert found[1.0] == measure.of(*file).held_out and found[0.25] != found[0.5]


def test_a_model_that_cannot_be_asked_is_refused_in_a_sentence(world):
    refused = world.model.clone()
    sampling = type("EDM", (), {"calculate_denoised": lambda self: 0, "calculate_input": 0, "noise_scaling": 0})()
    refused.add_object_patch("model_sampling", sampling)
    with pytest.raises(
        ValueError, match=r"^LoRAs cannot be measured on this model.*samples as .*, or load another model"
    ):
        world.measure(model=refused)


def _recaptioned(examples, change=lambda text: f"{text}, at night"):
    return tuple(replace(example, caption=change(example.caption)) for example in examples)
