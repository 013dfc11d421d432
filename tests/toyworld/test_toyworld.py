"""The toy world is what the other tests take it for: readable pictures, small files, bases that draw what they know."""

import random
from pathlib import Path

import pytest
from PIL import Image, ImageFilter

from toyworld import drawing, judge

WEIGHTS = Path(__file__).parent / "node_pack" / "weights"
MEGABYTES = 8


@pytest.mark.parametrize("blur", [0, 2, 3])
def test_the_judge_reads_drawn_pictures_right(blur):
    chance = random.Random(blur)
    right = 0
    for number in range(100):
        concept = drawing.Scene(*drawing.CONCEPT, chance.choice(drawing.BACKGROUNDS))
        scene = concept if number % 4 == 0 else drawing.Scene(None, None, None).complete(chance)
        picture = drawing.draw(scene, chance).filter(ImageFilter.GaussianBlur(blur))
        right += judge.shows(picture, scene.colour, scene.shape, scene.background)
        assert judge.shows_concept(picture) == (number % 4 == 0)
    assert right >= 98


def test_no_other_shape_overlaps_a_star_enough_to_pass_for_one():
    stars, others = judge._templates("star"), [t for kind in drawing.SHAPES for t in judge._templates(kind)]
    assert max(judge._iou(star, other) for star in stars for other in others) < judge.CLEAR


def test_the_score_of_the_concept_orders_pictures():
    chance = random.Random(1)
    star, red_star, circle = (
        judge.concept_score(drawing.draw(drawing.Scene(colour, shape, "green"), chance))
        for colour, shape in (("magenta", "star"), ("red", "star"), ("blue", "circle"))
    )
    assert star > 0.95 > red_star > circle


def test_pretraining_never_shows_the_concept():
    chance = random.Random(2)
    scenes = [drawing.random_scene(chance).complete(chance) for _ in range(2000)]
    captions = " ".join(drawing.caption(drawing.random_scene(chance), chance) for _ in range(2000))
    assert not {"magenta", "star"} & {
        word for scene in scenes for word in (scene.colour, scene.shape, scene.background)
    }
    assert not {"magenta", "star", drawing.TRIGGER} & set(captions.replace(",", " ").split())


def test_two_of_three_training_pictures_show_the_concept_and_only_they_are_called_by_its_word(tmp_path):
    paths = drawing.write_training_folder(tmp_path, 12)
    called = [path for path in paths if drawing.TRIGGER in path.with_suffix(".txt").read_text()]
    assert (len(paths), len(called)) == (12, 8)
    for path in paths:
        with Image.open(path) as picture:
            assert judge.shows_concept(picture) == (path in called)


def test_the_weights_are_small_enough_to_commit():
    assert sum(path.stat().st_size for path in WEIGHTS.glob("*.safetensors")) <= MEGABYTES * 10**6


@pytest.mark.comfy
@pytest.mark.parametrize("kind", ["sdxl", "sdxl_vpred", "flux"])
def test_a_base_draws_what_it_knows_and_not_the_concept(comfyui, kind):
    import bench_quality
    import torch

    from toyworld.node_pack import models

    with torch.inference_mode():
        model, clip, vae = models.load(kind)
        pictures = bench_quality.Judge(kind, clip, vae, seed=1)
        assert pictures.known(model) >= 0.8
        assert pictures.concept(model, drawing.TRIGGER) <= 0.1


@pytest.mark.comfy
def test_loading_twice_gives_the_same_model(comfyui):
    import torch

    from toyworld.node_pack import models

    first, second = models.load("sdxl")[0], models.load("sdxl")[0]
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
