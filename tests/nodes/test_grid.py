"""The Picker's grid: every cell is what Load LoRA and KSampler draw, and none is drawn twice."""

from types import SimpleNamespace

import comfy.model_management as mm
import folder_paths
import hosttoys
import numpy as np
import pytest
import queueing
import torch
from comfy_extras import nodes_freelunch
from PIL import Image
from safetensors.torch import load_file, save_file

import nodes
from lora_workbench.nodes import grid
from lora_workbench.nodes.grid import Column, columns
from lora_workbench.nodes.host.progress import Progress
from lora_workbench.nodes.host.sampling import SamplerSettings
from lora_workbench.nodes.host.surroundings import surroundings_of
from lora_workbench.training import lora_file
from lora_workbench.training.checkpoint import Checkpoint, Checkpoints
from lora_workbench.training.config import LoraConfig

pytestmark = pytest.mark.comfy
both_families = pytest.mark.parametrize("kind", ["sdxl", "flux"])
sdxl_alone = pytest.mark.parametrize("kind", ["sdxl"])
TEXT_LAYERS = {
    "kohya": "lora_te1_text_model_encoder_layers_0_mlp_fc1",
    "comfyui": "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1",
}
SIZE = 64


class World:
    """A model with its LoRA files, and how often a picture was made."""

    def __init__(self, kind, folder) -> None:
        self.kind, self.folder = kind, folder
        self.model, self.clip, self.vae = queueing.shared_models(kind)
        flux = kind == "flux"
        self.settings = SamplerSettings(
            SIZE, SIZE, 5, 1.0 if flux else 5.0, "euler", "simple" if flux else "normal", steps=2
        )
        self.drawn: list[str] = []
        self.told: list[grid.Cell] = []

    def lora(self, step, text=None, average="") -> Checkpoint:
        """A LoRA file of random weights, also for a layer of the text encoder where a form of its key is given."""
        adapters = hosttoys.attach(hosttoys.loaded(self.model), active=False)
        random = torch.Generator().manual_seed(step)
        tensors = lora_file.file_tensors(adapters.state(), LoraConfig(rank=2, alpha=1.0), torch.float32)
        if text:
            layer = TEXT_LAYERS[text]
            tensors |= {f"{layer}.lora_down.weight": torch.empty(2, 64), f"{layer}.lora_up.weight": torch.empty(128, 2)}
        for key, tensor in tensors.items():
            if not key.endswith(".alpha"):
                tensors[key] = (0.4 if "text" in key else 0.2) * torch.randn(tensor.shape, generator=random)
        name = f"star/star_{step:06d}{'_ema' if average else ''}.safetensors"
        (self.folder / "star").mkdir(exist_ok=True)
        save_file(tensors, self.folder / name)
        return Checkpoint(step, str(self.folder / name), name, average=average)

    def draw(self, drawn_columns, *prompts, **changes) -> grid.Grid:
        facts = {"model": self.model, "clip": self.clip, "vae": self.vae, "settings": self.settings, **changes}
        self.drawn.clear()
        self.told.clear()
        with torch.inference_mode():
            return grid.draw(
                columns=drawn_columns, prompts=prompts, progress=Progress(None), told=self.told.append, **facts
            )

    def by_the_graphs_nodes(self, column, prompt) -> np.ndarray:
        """Load LoRA, CLIPTextEncode, EmptyLatentImage, KSampler and VAEDecode, in 8 bits as Save Image makes them."""
        with torch.inference_mode():
            model, clip, at = self.model, self.clip, self.settings
            if column.checkpoint is not None:
                strengths = column.strength, column.strength
                model, clip = nodes.LoraLoader().load_lora(model, clip, column.checkpoint.lora_name, *strengths)
            (positive,), (negative,) = (nodes.CLIPTextEncode().encode(clip, text) for text in (prompt, ""))
            (latent,) = nodes.EmptyLatentImage().generate(at.width, at.height)
            widgets = at.seed, at.steps, at.cfg, at.sampler, at.scheduler
            (samples,) = nodes.KSampler().sample(model, *widgets, positive, negative, latent)
            (pictures,) = nodes.VAEDecode().decode(self.vae, samples)
        return np.clip(255.0 * pictures[0].cpu().numpy(), 0, 255).astype(np.uint8)


@pytest.fixture
def world(kind, tmp_path, monkeypatch, comfyui) -> World:
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    loras = tmp_path / "loras"
    loras.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(loras)], {".safetensors"}))
    world, real = World(kind, loras), grid.sample_picture

    def counting(*inputs):
        world.drawn.append(inputs)
        return real(*inputs)

    monkeypatch.setattr(grid, "sample_picture", counting)
    return world


def pixels(cell) -> np.ndarray:
    return np.asarray(Image.open(cell.path))


@pytest.mark.parametrize(
    ("kind", "text"), [("sdxl", None), ("sdxl", "kohya"), ("sdxl", "comfyui"), ("flux", None), ("flux", "kohya")]
)
def test_a_cell_is_what_load_lora_and_ksampler_draw_bit_for_bit(world, text):
    entry, prompts = world.lora(3, text), ("a (red:1.2) circle", "zork")
    asked = [Column(), Column(entry), Column(entry, 0.6)]
    drawn = world.draw(asked, *prompts)
    pictures = [pixels(cell) for cell in drawn.cells]
    assert [(cell.column, cell.prompt) for cell in drawn.cells] == [(column, n) for column in asked for n in (0, 1)]
    for cell, picture in zip(drawn.cells, pictures, strict=True):
        assert np.array_equal(picture, world.by_the_graphs_nodes(cell.column, prompts[cell.prompt])), cell
    assert len({picture.tobytes() for picture in pictures}) == 6
    assert world.told == list(drawn.cells) and len(world.drawn) == 6


@both_families
def test_the_model_draws_afterwards_what_it_drew_before(world):
    before, weights = world.by_the_graphs_nodes(Column(), "zork"), hosttoys.digest(world.model.model.state_dict())
    world.draw([Column(world.lora(3, "kohya"))], "zork")
    assert not world.model.patches and not world.clip.patcher.patches
    assert np.array_equal(world.by_the_graphs_nodes(Column(), "zork"), before)
    assert hosttoys.digest(world.model.model.state_dict()) == weights


@sdxl_alone
def test_a_second_time_draws_nothing_and_another_prompt_draws_only_its_row(world):
    asked = [Column(), Column(world.lora(3)), Column(world.lora(6, "kohya"))]
    first = world.draw(asked, "zork")
    again = world.draw(asked, "zork")
    assert world.drawn == [] and again == first and world.told == list(again.cells)
    more = world.draw(asked, "a red circle", "zork")
    assert len(world.drawn) == 3
    assert [cell.path for cell in more.cells if cell.prompt == 1] == [cell.path for cell in first.cells]


@sdxl_alone
def test_a_changed_file_draws_its_own_cells_again_and_a_cover_in_it_does_not(world):
    entry, other = world.lora(3), world.lora(6)
    asked = [Column(), Column(entry), Column(other)]
    first = world.draw(asked, "zork")
    tensors = load_file(entry.path)
    save_file(tensors, entry.path, {"lora_workbench.strength": "0.8"})
    assert world.draw(asked, "zork") == first and world.drawn == []
    save_file({name: -tensor if name.endswith("up.weight") else tensor for name, tensor in tensors.items()}, entry.path)
    changed = world.draw(asked, "zork")
    assert len(world.drawn) == 1
    assert [one.path == other.path for one, other in zip(first.cells, changed.cells, strict=True)] == [
        True,
        False,
        True,
    ]
    assert np.array_equal(pixels(changed.cells[1]), world.by_the_graphs_nodes(Column(entry), "zork"))


@sdxl_alone
@pytest.mark.parametrize(
    "change", ["seed", "steps", "strength", "model", "clip", "clip layer", "another LoRA below", "FreeU"]
)
def test_whatever_else_decides_a_picture_draws_it_again(world, change):
    entry, facts = world.lora(3), {}
    first = world.draw([Column(entry)], "zork")
    column, settings = Column(entry), vars(world.settings)
    if change in ("seed", "steps"):
        facts["settings"] = SamplerSettings(**{**settings, change: settings[change] + 1})
    elif change == "strength":
        column = Column(entry, 0.9)
    elif change == "model":
        facts["model"] = hosttoys.model("sdxl", seed=8)
    elif change == "clip":
        facts["clip"] = hosttoys.clip("sdxl", seed=8)
    elif change == "clip layer":
        facts["clip"] = world.clip.clone()
        facts["clip"].clip_layer(-1)
    elif change == "FreeU":
        facts["model"] = nodes_freelunch.FreeU_V2.execute(world.model, 1.3, 1.4, 0.9, 0.2).args[0]
    else:
        with torch.inference_mode():
            below = world.lora(6).lora_name
            facts["model"], facts["clip"] = nodes.LoraLoader().load_lora(world.model, world.clip, below, 1.0, 1.0)
    assert world.draw([column], "zork", **facts).cells[0].path != first.cells[0].path and len(world.drawn) == 1


@sdxl_alone
def test_what_other_nodes_set_on_a_model_is_told_apart_by_its_values_not_by_its_objects(world):
    def freed(strength):
        return nodes_freelunch.FreeU_V2.execute(world.model, strength, 1.4, 0.9, 0.2).args[0]

    def described(model):
        return surroundings_of(model, world.clip)

    assert described(freed(1.3)) == described(freed(1.3)) == described(freed(1.3).clone())
    assert len({described(world.model), described(freed(1.3)), described(freed(1.2))}) == 3
    shifted, rescaled = world.model.clone(), world.model.clone()
    shifted.set_model_sampler_cfg_function(lambda args: args["cond"])
    rescaled.set_model_sampler_cfg_function(lambda args: args["uncond"])
    assert described(shifted) != described(rescaled)


@sdxl_alone
def test_cancel_keeps_the_cells_that_are_there(world):
    asked = [Column(), Column(world.lora(3))]
    pressed = queueing.at_forward(world.model, 4, queueing.interrupt, training=False)
    with pytest.raises(mm.InterruptProcessingException), pressed:
        world.draw(asked, "zork", "a red circle")
    kept = len(world.told)
    assert 1 <= kept < 4
    world.draw(asked, "zork", "a red circle")
    assert len(world.drawn) == 4 - kept


@sdxl_alone
def test_a_damaged_file_is_named(world):
    entry = world.lora(3)
    (world.folder / entry.lora_name).write_bytes(b"\x04\0\0\0\0\0\0\0null")
    with pytest.raises(ValueError, match=r"^The LoRA file 'star_000003\.safetensors' cannot be read"):
        world.draw([Column(entry)], "zork")


@sdxl_alone
def test_the_picture_shows_every_cell_and_says_which_is_picked(world):
    entry = world.lora(3)
    drawn = world.draw([Column(), Column(entry), Column(entry, 0.6)], "zork", "a red circle")
    marked, plain = np.asarray(drawn.picture(entry)), np.asarray(drawn.picture())
    gap = 6
    assert marked.shape == (30 + 2 * (SIZE + 26 + gap) + gap, 3 * (SIZE + gap) + gap, 3)
    for number, cell in enumerate(drawn.cells):
        left, top = gap + number // 2 * (SIZE + gap), 30 + 26 + cell.prompt * (SIZE + 26 + gap)
        assert np.array_equal(marked[top : top + SIZE, left : left + SIZE], pixels(cell))
    differs = (marked != plain).any(2).any(0).nonzero()[0]
    assert differs.min() >= SIZE + gap, "the untrained column is never the picked one"


@sdxl_alone
def test_a_grid_of_very_many_pictures_shows_them_smaller_and_leaves_their_files(world, monkeypatch):
    drawn = world.draw([Column(), Column(world.lora(3))], "zork")
    files = [cell.path.read_bytes() for cell in drawn.cells]
    monkeypatch.setattr(grid, "MOST_PIXELS", 2 * 32 * 32)
    assert drawn.picture().size == (2 * (32 + 6) + 6, 30 + 32 + 26 + 6 + 6)
    assert [cell.path.read_bytes() for cell in drawn.cells] == files


def test_without_prompts_or_columns_nothing_is_drawn():
    for given in ({"columns": [], "prompts": ["zork"]}, {"columns": [Column()], "prompts": []}):
        drawn = grid.draw(None, None, None, settings=None, progress=Progress(None), **given)
        assert drawn == grid.Grid() and drawn.picture().size == (64, 64)


# Which columns


def files(steps, averages=()):
    entries = tuple(Checkpoint(step, "", f"star_{step}") for step in steps)
    return Checkpoints("star", "", "zork", entries, averages=averages)


def decided(pick, safe=(), broken=()):
    named = [[Checkpoint(step, "", f"star_{step}") for step in steps] for steps in ((pick,), safe or (pick,), broken)]
    return SimpleNamespace(checkpoint=named[0][0], safe=tuple(named[1]), broken=tuple(named[2]))


def labels(*args):
    return [column.label for column in columns(*args)]


@pytest.mark.parametrize(
    ("steps", "pick", "safe", "shown"),
    [
        (range(1, 11), 6, (), [5, 6, 7, 10]),
        (range(1, 11), 6, (3, 4, 5, 6, 7, 8), [3, 6, 8, 10]),
        (range(1, 11), 10, (), [7, 8, 9, 10]),
        (range(1, 11), 1, (), [1, 2, 3, 10]),
        (range(1, 11), 9, (), [7, 8, 9, 10]),
        (range(1, 11), 6, (6, 7, 8, 9, 10), [5, 6, 7, 10]),
        (range(1, 4), 2, (), [1, 2, 3]),
        ([4], 4, (), [4]),
    ],
)
def test_the_shortlist_is_the_pick_one_before_one_after_and_the_last(steps, pick, safe, shown):
    assert labels(files(steps), decided(pick, safe), "shortlist") == ["untrained", *(f"step {step}" for step in shown)]


def test_a_broken_file_is_not_drawn_and_an_average_only_where_it_is_the_pick():
    ema = Checkpoint(6, "", "star_6_ema", average="EMA")
    of_last = Checkpoint(8, "", "star_last3", average="last 3")
    there = files(range(2, 9), (ema, of_last))
    assert labels(there, decided(4, broken=(5, 8)), "shortlist") == [
        "untrained", "step 3", "step 4", "step 6", "step 7",
    ]  # fmt: skip
    picked = SimpleNamespace(checkpoint=ema, safe=(ema,), broken=())
    assert labels(there, picked, "shortlist") == ["untrained", "step 6", "step 6, EMA", "step 7", "step 8"]
    everything = labels(there, decided(4, broken=(5, 8)), "everything")
    assert everything == ["untrained", "step 2", "step 3", "step 4", "step 6", "step 6, EMA", "step 7", "last 3"]


def test_every_file_is_shown_at_every_strength_beside_one_untrained_column():
    drawn = columns(files([2, 4]), decided(4), "everything", (0.0, 0.6, 1.0, 0.6))
    assert [column.label for column in drawn] == [
        "untrained", "step 2 at 0.6", "step 2", "step 4 at 0.6", "step 4",
    ]  # fmt: skip
    assert labels(files([2]), decided(2), "everything", (0.0,)) == ["untrained", "step 2"]
    assert columns(files([2]), decided(2), "nothing", (1.0,)) == []


def test_where_the_pick_is_broken_the_last_ones_are_shown_and_where_all_are_the_untrained_model_alone():
    assert labels(files([2, 4, 6]), decided(6, broken=(6,)), "shortlist") == ["untrained", "step 2", "step 4"]
    assert labels(files([2, 4]), decided(4, broken=(2, 4)), "shortlist") == ["untrained"]
