"""A folder of LoRA files from any trainer as the checkpoints of one run."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_workbench.training import description
from lora_workbench.training.lora_series import folders_with_loras, number_in, series, state_of

KOHYA = {"ss_steps": "300", "ss_epoch": "3", "ss_num_epochs": "10"}


def put(path: Path, **entries: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"lora_unet_a.lora_up.weight": torch.ones(2, 1)}, path, metadata=entries or None)
    return path


def read(folder: Path, root: Path) -> list[tuple[int, str]]:
    return [(entry.step, entry.lora_name) for entry in series(folder, root).entries]


SERIES = {
    "kohya, epochs": (
        {
            "s/star.safetensors": {"ss_steps": "1200"},
            "s/star-000002.safetensors": {"ss_steps": "200"},
            "s/star-000010.safetensors": {"ss_steps": "1000"},
        },
        [(200, "star-000002"), (1000, "star-000010"), (1200, "star")],
    ),
    "kohya, steps, without metadata": (
        {"s/star-step00000500.safetensors": {}, "s/star-step00001000.safetensors": {}, "s/star.safetensors": {}},
        [(500, "star-step00000500"), (1000, "star-step00001000"), (1500, "star")],
    ),
    "ai-toolkit": (
        {
            "s/star_000000500.safetensors": {"training_info": json.dumps({"step": 500, "epoch": 4})},
            "s/star_000000250.safetensors": {"training_info": json.dumps({"step": 250, "epoch": 2})},
            "s/star.safetensors": {"training_info": json.dumps({"step": 600, "epoch": 5})},
        },
        [(250, "star_000000250"), (500, "star_000000500"), (600, "star")],
    ),
    "OneTrainer": (
        {
            "s/2025-01-31_12-00-00-save-1500-10-0.safetensors": {"ot_branch": "master"},
            "s/2025-01-31_09-30-00-save-300-2-0.safetensors": {"ot_branch": "master"},
        },
        [(300, "2025-01-31_09-30-00-save-300-2-0"), (1500, "2025-01-31_12-00-00-save-1500-10-0")],
    ),
    "diffusers": (
        {
            "s/checkpoint-1000/pytorch_lora_weights.safetensors": {},
            "s/checkpoint-500/pytorch_lora_weights.safetensors": {},
            "s/pytorch_lora_weights.safetensors": {},
        },
        [
            (500, "checkpoint-500/pytorch_lora_weights"),
            (1000, "checkpoint-1000/pytorch_lora_weights"),
            (1500, "pytorch_lora_weights"),
        ],
    ),
    "ours": (
        {
            "s/star_000100.safetensors": {"lora_workbench.step": "100", "ss_steps": "100"},
            "s/star_000050.safetensors": {"lora_workbench.step": "50", "ss_steps": "50"},
        },
        [(50, "star_000050"), (100, "star_000100")],
    ),
    "short epochs": (
        {"s/star-e2.safetensors": {}, "s/star-e10.safetensors": {}, "s/star-e1.safetensors": {}},
        [(1, "star-e1"), (2, "star-e2"), (10, "star-e10")],
    ),
    "no numbers at all": (
        {"s/red.safetensors": {}, "s/blue.safetensors": {}},
        [(1, "blue"), (2, "red")],
    ),
}


@pytest.mark.parametrize("trainer", SERIES)
def test_files_of_every_trainer_are_in_the_order_of_their_training(trainer, tmp_path):
    files, expected = SERIES[trainer]
    for name, entries in files.items():
        put(tmp_path / name, **entries)
    listed = [(step, str(Path("s", f"{name}.safetensors"))) for step, name in expected]
    assert read(tmp_path / "s", tmp_path) == listed


def test_what_a_file_says_counts_before_its_name(tmp_path):
    put(tmp_path / "s/star-000001.safetensors", ss_steps="900")
    put(tmp_path / "s/star-000002.safetensors", ss_steps="600")
    assert read(tmp_path / "s", tmp_path) == [
        (600, os.path.join("s", "star-000002.safetensors")),
        (900, os.path.join("s", "star-000001.safetensors")),
    ]


def test_a_broken_file_stays_in_at_the_step_that_its_name_means_in_this_run(tmp_path):
    put(tmp_path / "s/star-000001.safetensors", ss_steps="120")
    (tmp_path / "s/star-000002.safetensors").write_bytes(b"\x08\0\0\0")
    put(tmp_path / "s/star-000003.safetensors", ss_steps="360")
    assert [step for step, _ in read(tmp_path / "s", tmp_path)] == [120, 240, 360]


@pytest.mark.parametrize(
    "told",
    [
        {"ss_steps": "None"},
        {"ss_steps": "-3"},
        {"ss_steps": "9" * 40},
        {"training_info": "[1]"},
        {"training_info": "{"},
        {"training_info": "{}"},
    ],
    ids=str,
)
def test_a_step_that_is_no_number_is_as_good_as_none(told, tmp_path):
    put(tmp_path / "s/star_000070.safetensors", **told)
    assert [step for step, _ in read(tmp_path / "s", tmp_path)] == [70]


def test_averages_of_ours_are_no_part_of_the_trajectory(tmp_path):
    put(tmp_path / "s/star_000100.safetensors", **{"lora_workbench.step": "100"})
    put(tmp_path / "s/star_000100_ema.safetensors", **{"lora_workbench.step": "100", "lora_workbench.average": "EMA"})
    put(tmp_path / "s/star_last3.safetensors", **{"lora_workbench.step": "100", "lora_workbench.average": "last 3"})
    found = series(tmp_path / "s", tmp_path)
    assert [entry.average for entry in found.entries] == [""]
    assert [(entry.step, entry.average) for entry in found.averages] == [(100, "EMA"), (100, "last 3")]


def test_the_paths_lead_to_the_files_and_the_trigger_word_is_the_one_they_name(tmp_path):
    path = put(tmp_path / "a/s/star_000100.safetensors", **{"modelspec.trigger_phrase": "zork"})
    found = series(tmp_path / "a/s", tmp_path)
    assert (found.name, found.trigger_word, found.base_validation) == ("s", "zork", None)
    assert Path(found.entries[0].path) == path and Path(tmp_path, found.entries[0].lora_name) == path


def test_states_of_optimizers_and_files_being_written_are_no_checkpoints(tmp_path):
    put(tmp_path / "s/star_000100.safetensors")
    for name in ("optimizer.pt", "config.yaml", ".writing-x.safetensors", "star_000100.preview.png"):
        (tmp_path / "s" / name).write_bytes(b"x")
    put(tmp_path / "s/checkpoint-100/model.safetensors")
    assert len(series(tmp_path / "s", tmp_path).entries) == 1


def test_only_a_lora_that_came_went_or_changed_is_news(tmp_path):
    first = put(tmp_path / "s/star_000100.safetensors", **{"lora_workbench.step": "100"})
    states = [state_of(tmp_path / "s")]
    put(tmp_path / "s/other/star_000100.safetensors")
    (tmp_path / "s/star_000100.preview.png").write_bytes(b"x")
    description.amend(first, strength="0.75")
    assert state_of(tmp_path / "s") == states[0] and len(states[0]) == 1
    second = put(tmp_path / "s/checkpoint-200/pytorch_lora_weights.safetensors")
    states.append(state_of(tmp_path / "s"))
    os.utime(second, ns=(10**18, 10**18))
    states.append(state_of(tmp_path / "s"))
    first.unlink()
    states.append(state_of(tmp_path / "s"))
    assert len(set(map(str, states))) == 4 and state_of(tmp_path / "gone") == []


def test_a_folder_without_loras_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "loras/empty").mkdir(parents=True)
    with pytest.raises(ValueError, match="holds no LoRA file"):
        series(tmp_path / "loras/empty", tmp_path / "loras")
    with pytest.raises(ValueError, match="is not there"):
        series(tmp_path / "loras/gone", tmp_path / "loras")


@pytest.mark.parametrize("name", ["..", "../other", "s/../../other", "/"])
def test_no_folder_outside_the_loras_folder_is_read(name, tmp_path):
    put(tmp_path / "other/star_000100.safetensors")
    put(tmp_path / "loras/s/star_000100.safetensors")
    with pytest.raises(ValueError, match="not inside the loras folder"):
        series(tmp_path / "loras" / name, tmp_path / "loras")


def test_the_list_names_every_folder_that_holds_loras_and_no_folder_of_a_single_step(tmp_path):
    for name in ("s10/a", "s2/a", "deep/er/a", "s2/checkpoint-500/pytorch_lora_weights", ".hidden/a"):
        put(tmp_path / f"{name}.safetensors")
    put(tmp_path / "d/checkpoint-10/pytorch_lora_weights.safetensors")
    (tmp_path / "notes").mkdir()
    assert folders_with_loras(tmp_path) == ["d", "deep/er", "s2", "s10"]
    put(tmp_path / "loose.safetensors")
    assert folders_with_loras(tmp_path)[0] == "."
    assert [entry.lora_name for entry in series(tmp_path / ".", tmp_path).entries] == ["loose.safetensors"]


def test_a_loras_folder_that_is_not_there_lists_nothing(tmp_path):
    assert folders_with_loras(tmp_path / "loras") == []


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("star_v2", None),
        ("star_rank16", None),
        ("sdxl", None),
        ("house2", None),
        ("star-lora-e07", 7),
        ("star_epoch_12", 12),
        ("Epoch 3", 3),
        ("star_v2-000004", 4),
        ("star_1500_steps", 1500),
        ("star_steps_1500_e3", 1500),
        ("000300", 300),
    ],
)
def test_a_number_in_a_name_counts_only_where_it_means_training(name, number):
    assert number_in(name) == number
