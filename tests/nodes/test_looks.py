"""What is said of the grid's pictures, by an image encoder that sees their mean colour."""

import weakref
from types import SimpleNamespace

import pytest
from PIL import Image

from lora_workbench.nodes import looks as module
from lora_workbench.nodes.grid import Cell, Column, Grid
from lora_workbench.nodes.host.progress import Progress
from lora_workbench.nodes.looks import Looks
from lora_workbench.nodes.pictures import to_image
from lora_workbench.training.checkpoint import Checkpoint
from lora_workbench.training.dataset import Example
from lora_workbench.training.folder import scan
from lora_workbench.training.masks import shown

pytestmark = pytest.mark.comfy
EARLY, LATE = (Checkpoint(step, f"{step}.safetensors", f"{step}.safetensors") for step in (100, 200))


@pytest.fixture
def picture(tmp_path):
    def made(name, colour):
        path = tmp_path / f"{name}.png"
        Image.new("RGB", (16, 16), colour).save(path)
        return path

    return made


@pytest.fixture
def looks(picture):
    """Training pictures are nearly red; the base draws blue, the early file purple, and the late one red."""
    training = [Example(picture(n, (255, 12 * n, 0)), "zork", 16, 16) for n in range(8)]
    colours = {None: (0, 0, 255), EARLY: (128, 0, 128), LATE: (255, 40, 0)}
    cells = tuple(Cell(Column(c), 0, picture(f"cell {colour}", colour)) for c, colour in colours.items())
    drawn = Grid(tuple(map(Column, colours)), ("a zork",), cells)

    encoder = SimpleNamespace(encode_image=lambda pixels: {"image_embeds": pixels.mean((1, 2))})

    def made(prompts=("a zork",), clip_vision=encoder):
        request = SimpleNamespace(clip_vision=clip_vision)
        return Looks(request, Grid(drawn.columns, prompts, drawn.cells), training, ["zork"], Progress(None))

    return made


def test_the_file_that_draws_most_like_the_training_pictures_is_the_likest(looks):
    found = looks().likeness()
    assert 0 < found["100.safetensors"] < found["200.safetensors"] <= 1.1 and len(found) == 2


def test_without_encoder_or_a_prompt_that_calls_it_nothing_is_said(looks):
    assert looks(prompts=("a star",)).likeness() == {} and looks(clip_vision=None).likeness() == {}
    assert looks(clip_vision=None).notes(EARLY) == []
    (said,) = looks().notes(Checkpoint(300, "300.safetensors", "300.safetensors"))
    assert said.startswith("The CLIP_VISION was not used")


def test_training_pictures_are_in_memory_one_at_a_time(looks, monkeypatch):
    shown, alive = [], []

    def shown_as(picture):
        shown.append(weakref.ref(picture))
        alive.append(sum(one() is not None for one in shown))
        return to_image(picture)

    monkeypatch.setattr(module, "to_image", shown_as)
    looks().likeness()
    assert len(shown) > 8 and max(alive) <= 3


def test_a_copy_of_a_training_picture_as_it_was_painted_over_is_one(tmp_path):
    for number in range(8):
        noise = Image.effect_noise((64, 64), 80).convert("RGB")
        noise.paste(Image.linear_gradient("L").rotate(45 * number).resize((32, 64)).convert("RGB"), (0, 0))
        noise.save(tmp_path / f"{number}.png")
        mask = Image.new("L", (64, 64))
        mask.paste(255, (0, 0, 32, 64))
        mask.save(tmp_path / f"{number}_mask.png")
    training = scan(tmp_path, resolution=64, hold_out=0, fill_masked=True).examples
    shown(training[0]).save(tmp_path / "drawn.png")
    drawn = Grid((Column(EARLY),), ("a zork",), (Cell(Column(EARLY), 0, tmp_path / "drawn.png"),))
    encoder = SimpleNamespace(encode_image=lambda pixels: {"image_embeds": pixels.flatten(1)})
    seen = Looks(SimpleNamespace(clip_vision=encoder), drawn, training, ["zork"], Progress(None))
    assert [copy.training for copy in seen._copies(Column(EARLY))] == [0]
