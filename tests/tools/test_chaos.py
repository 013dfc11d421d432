"""The tool that kills the server notices what it is there to notice."""

from pathlib import Path

import chaos
import example
import pytest
import torch
from PIL import Image
from safetensors.torch import save


@pytest.fixture
def world(tmp_path) -> chaos.World:
    """What a training left behind, without a server."""
    world = chaos.World(Path(), tmp_path, example.FAMILIES["sdxl"])
    previews = world.work / "runs" / chaos.NAME / "previews"
    previews.mkdir(parents=True)
    world.loras.mkdir(parents=True)
    (world.loras / "chaos_000003.safetensors").write_bytes(save({"a": torch.ones(4)}))
    (previews.parent / "state.safetensors").write_bytes(save({"weights/a": torch.ones(4)}))
    (previews.parent / "record.json").write_text("{}")
    Image.new("RGB", (8, 8)).save(previews / "000003.png")
    return world


def test_whole_files_are_counted_and_unfinished_ones_told_apart(world):
    assert chaos.check_whole(world) == (4, 0)
    (world.loras / ".writing-x.safetensors").write_bytes(b"half")
    assert chaos.check_whole(world) == (4, 1)


@pytest.mark.parametrize("name", ["chaos_000003.safetensors", "state.safetensors", "record.json", "000003.png"])
def test_half_a_file_under_its_own_name_is_noticed(world, name):
    (path,) = world.base.rglob(name)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(chaos.Broken, match=f"{name} is not whole"):
        chaos.check_whole(world)


def test_what_is_left_unfinished_after_the_end_is_noticed(world):
    chaos.check_settled(world)
    (world.work / "runs" / chaos.NAME / ".writing-x.json").write_text("{")
    with pytest.raises(chaos.Broken, match="left unfinished files behind: .writing-x.json"):
        chaos.check_settled(world)


def test_one_other_byte_is_another_result(world):
    before = world.results()
    path = world.loras / "chaos_000003.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert world.results() != before


def test_memory_that_grows_is_not_called_flat(capsys):
    assert chaos.report_memory([1000.0] * 20) == 0
    assert chaos.report_memory([1000.0 + 10 * cycle for cycle in range(20)]) == 1
    assert "It grew by" in capsys.readouterr().out
