import os

import pytest
import torch
from safetensors.torch import save_file

from lora_workbench.training.lora_content import content_of


def saved(path, tensors, **told):
    save_file(tensors, path, told or None)
    return content_of(path)


def test_the_content_is_that_of_the_tensors_whatever_the_file_says_about_itself(tmp_path):
    tensors = {"a": torch.arange(6.0), "b": torch.ones(2, 3)}
    first = saved(tmp_path / "one.safetensors", tensors)
    assert sorted(first.names) == ["a", "b"]
    assert first == saved(tmp_path / "two.safetensors", tensors, title="star", cover="x" * 999)


@pytest.mark.parametrize(
    "changed",
    [
        {"a": torch.arange(6.0) + 1},
        {"c": torch.arange(6.0)},
        {"a": torch.arange(6.0).reshape(2, 3)},
        {"a": torch.arange(6.0).view(torch.int32)},
    ],
    ids=["values", "name", "shape", "kind"],
)
def test_other_tensors_are_another_content(tmp_path, changed):
    assert saved(tmp_path / "one.safetensors", {"a": torch.arange(6.0)}) != saved(tmp_path / "two.safetensors", changed)


def test_a_file_that_changed_is_read_again_and_one_that_did_not_is_not(tmp_path):
    path = tmp_path / "one.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    os.utime(path, (1, 1))
    first, size = content_of(path), path.stat().st_size
    path.write_bytes(b"\0" * size)
    os.utime(path, (1, 1))
    assert content_of(path) == first
    os.utime(path, (2, 2))
    assert content_of(path) != first


@pytest.mark.parametrize("data", [b"", b"no LoRA", b"\x04\0\0\0\0\0\0\0null", b"\xff" * 40, b"\x02\0\0\0\0\0\0\0{]"])
def test_a_file_of_another_format_is_taken_as_a_whole(tmp_path, data):
    (tmp_path / "one.pt").write_bytes(data)
    (tmp_path / "two.pt").write_bytes(data + b"!")
    one, two = content_of(tmp_path / "one.pt"), content_of(tmp_path / "two.pt")
    assert one.names == two.names == () and one.digest != two.digest
