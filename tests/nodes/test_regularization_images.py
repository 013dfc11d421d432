"""LoRA Regularization Images: made once by ComfyUI's own sampler, kept, and gone on with."""

import comfy.model_management as mm
import folder_paths
import hosttoys
import numpy as np
import pytest
import queueing
import torch
from PIL import Image

import nodes
from lora_workbench.nodes import class_pictures
from lora_workbench.nodes.host.architecture import family_of
from lora_workbench.nodes.host.sampling import sample_picture
from lora_workbench.nodes.regularization_images import LoraWorkbenchRegularizationImages
from lora_workbench.training.dataset import REGULARIZATION, joined
from lora_workbench.training.folder import scan

pytestmark = pytest.mark.comfy


@pytest.fixture
def output(tmp_path, monkeypatch, comfyui):
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return tmp_path / "output" / "lora_workbench" / "regularization"


@pytest.fixture
def drawn(monkeypatch):
    """The seeds of the pictures that the sampler was asked for."""
    seeds = []

    def sample(model, vae, positive, negative, settings):
        seeds.append(settings.seed)
        return sample_picture(model, vae, positive, negative, settings)

    monkeypatch.setattr(class_pictures, "sample_picture", sample)
    return seeds


def make(kind="sdxl", count=2, **changes):
    inputs = {
        "prompt": "a red circle",
        "count": count,
        "width": 64,
        "height": 48,
        "seed": 5,
        "weight": 0.5,
        "steps": 2,
        "cfg": 0.0,
        "sampler": "automatic",
        "scheduler": "automatic",
        "negative_prompt": "",
        **dict(zip(("model", "clip", "vae"), queueing.shared_models(kind), strict=True)),
        **changes,
    }
    return queueing.run(LoraWorkbenchRegularizationImages, **inputs)


def by_the_graphs_nodes(kind, seed):
    model, clip, vae = queueing.shared_models(kind)
    family = family_of(model)
    with torch.inference_mode():
        (positive,), (negative,) = (nodes.CLIPTextEncode().encode(clip, text) for text in ("a red circle", ""))
        (latent,) = nodes.EmptyLatentImage().generate(64, 48)
        widgets = (seed, 2, family.cfg, family.sampler, family.scheduler)
        (samples,) = nodes.KSampler().sample(model, *widgets, positive, negative, latent)
        (pixels,) = nodes.VAEDecode().decode(vae, samples)
    return np.clip(255.0 * pixels[0].cpu().numpy(), 0, 255).astype(np.uint8)


def contents(folder):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*.*")}


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_picture_k_is_what_the_graph_draws_with_seed_plus_k(kind, output):
    result = make(kind)
    examples = result["dataset"].examples
    for number, example in enumerate(examples):
        expected = by_the_graphs_nodes(kind, 5 + number)
        assert np.array_equal(np.asarray(Image.open(example.path)), expected)
        assert np.array_equal((result["images"][number].numpy() * 255).round().astype(np.uint8), expected)
    assert len(examples) == 2


def test_it_is_a_regularization_dataset_with_the_prompt_as_caption(output):
    dataset = make(prompt=" a red\ncircle ")["dataset"]
    for example in dataset.examples:
        assert (example.role, example.weight, example.caption) == (REGULARIZATION, 0.5, "a red circle")
        assert example.path.with_suffix(".txt").read_text() == "a red circle\n"
        assert example.path.parent.parent == output
    assert (dataset.held_out, dataset.uncaptioned, dataset.trigger_word, dataset.notes) == ((), (), "", ())


def test_joined_to_the_pictures_of_a_subject_it_keeps_its_role_and_has_no_trigger_word(output, tmp_path):
    subject = scan(queueing.draw_folder(tmp_path / "subject"), trigger_word="zork", hold_out=0, resolution=64)
    whole = joined([make()["dataset"], subject])
    assert [example.role for example in whole.examples] == [REGULARIZATION] * 2 + ["train"] * 4
    assert [example.caption for example in whole.examples[:2]] == ["a red circle"] * 2


def test_a_second_queue_makes_nothing_and_touches_no_file(output, drawn):
    first = make()
    before = contents(output)
    second = make()
    assert drawn == [5, 6] and contents(output) == before
    assert second["dataset"] == first["dataset"] and torch.equal(second["images"], first["images"])
    assert "2 pictures of 'a red circle': 2 made, 0 there already" in first["report"]
    assert "0 made, 2 there already" in second["report"]


def test_a_larger_count_only_adds_and_a_smaller_one_takes_the_first(output, drawn):
    make(count=2)
    before = contents(output)
    assert len(make(count=3)["dataset"].examples) == 3
    assert drawn == [5, 6, 7]
    assert {name: contents(output)[name] for name in before} == before
    assert [example.path.name for example in make(count=1)["dataset"].examples] == ["00000.png"]
    assert len(drawn) == 3


def test_a_deleted_picture_is_made_again_as_it_was_with_the_caption_it_has(output, drawn):
    path = make(count=3)["dataset"].examples[1].path
    before, state = path.read_bytes(), LoraWorkbenchRegularizationImages.fingerprint_inputs()
    path.with_suffix(".txt").write_text("my own words")
    path.unlink()
    assert LoraWorkbenchRegularizationImages.fingerprint_inputs() != state
    captions = [example.caption for example in make(count=3)["dataset"].examples]
    assert drawn == [5, 6, 7, 6] and path.read_bytes() == before
    assert captions == ["a red circle", "my own words", "a red circle"]


def test_cancel_keeps_what_is_done_and_queueing_again_goes_on(output, drawn):
    model = queueing.shared_models("sdxl")[0]
    with (
        queueing.at_forward(model, 6, queueing.interrupt, training=False),
        pytest.raises(mm.InterruptProcessingException),
    ):
        make(count=4)
    done = len(list(output.rglob("*.png")))
    assert 0 < done < 4 and all(path.with_suffix(".txt").is_file() for path in output.rglob("*.png"))
    before = contents(output)
    assert len(make(count=4)["dataset"].examples) == 4
    assert len(drawn) == 5 and {name: contents(output)[name] for name in before} == before


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": "a blue circle"},
        {"negative_prompt": "blurry"},
        {"seed": 6},
        {"steps": 3},
        {"width": 72},
        {"cfg": 2.0},
        {"sampler": "dpmpp_2m"},
        {"scheduler": "karras"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_settings_have_a_folder_of_their_own(changes, output):
    model, clip, vae = queueing.shared_models("sdxl")
    folders = {
        class_pictures.ClassPictures(model, clip, vae, prompt, negative, settings).folder
        for prompt, negative, settings in (asked({}), asked(changes))
    }
    assert len(folders) == 2


def asked(changes):
    from lora_workbench.nodes.regularization_images import settings_for

    chosen = {"prompt": "a red circle", "negative_prompt": "", "width": 64, "height": 48, "seed": 5, "steps": 2}
    chosen = {**chosen, "cfg": 0.0, "sampler": "automatic", "scheduler": "automatic", **changes}
    texts = chosen.pop("prompt"), chosen.pop("negative_prompt")
    return *texts, settings_for(queueing.shared_models("sdxl")[0], **chosen)


def test_another_model_and_another_clip_skip_have_a_folder_of_their_own(output):
    model, clip, vae = queueing.shared_models("sdxl")
    skipping = clip.clone()
    skipping.clip_layer(-2)
    others = [(hosttoys.model("sdxl", seed=4), clip), (model, skipping), (model, clip)]
    assert len({class_pictures.ClassPictures(*pair, vae, *asked({})).folder for pair in others}) == 3


def test_seeds_go_on_from_zero_after_the_largest(output, drawn):
    make(seed=2**64 - 1)
    assert drawn == [2**64 - 1, 0]


def test_an_empty_prompt_is_refused(output):
    with pytest.raises(ValueError, match="prompt is empty: write what the class is"):
        make(prompt=" \n")
    assert not output.exists()
