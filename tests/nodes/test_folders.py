"""What a typed path or a name from a workflow may reach."""

import os

import pytest

from lora_workbench.nodes.host import folders

pytestmark = pytest.mark.comfy


@pytest.fixture
def loras(host_folder):
    """The loras folder with a file in it, one in a sub-folder, and things that must not be reached."""
    folder = host_folder / "models" / "loras"
    (folder / "people").mkdir(exist_ok=True)
    for name in ("plain.safetensors", "people/anna.safetensors", "notes.txt"):
        (folder / name).write_bytes(b"x")
    (folder.parent / "outside.safetensors").write_bytes(b"x")
    return folder


def test_checkpoints_go_where_every_loader_looks(loras):
    assert folders.loras_folder() == loras
    assert "plain.safetensors" in folders.lora_names()


@pytest.mark.parametrize("name", ["people/anna.safetensors", "people\\anna.safetensors"])
def test_both_separators_name_the_same_file(loras, name):
    assert folders.lora_path(name) == loras / "people" / "anna.safetensors"


def test_a_file_written_a_moment_ago_is_found(loras):
    (loras / "new").mkdir(exist_ok=True)
    (loras / "new" / "step_10.safetensors").write_bytes(b"x")
    assert folders.lora_path("new/step_10.safetensors").is_file()


def test_a_missing_lora_is_named(loras):
    with pytest.raises(ValueError, match="The LoRA 'gone.safetensors' is not in the loras folder"):
        folders.lora_path("gone.safetensors")


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "people/../../outside.safetensors",
        "people\\..\\..\\outside.safetensors",
        "/etc/passwd",
        "/plain.safetensors",
        "C:\\plain.safetensors",
        "\\\\server\\share\\x.safetensors",
        "notes.txt",
        "people",
        "plain.safetensors\0.txt",
        "",
        ".",
    ],
)
def test_a_name_never_leaves_the_loras_folder(loras, name):
    with pytest.raises(ValueError, match="is not the name of a LoRA file"):
        folders.lora_path(name)


def test_typed_folders_are_understood(host_folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert folders.dataset_folder("cats") == host_folder / "input" / "cats"
    assert folders.dataset_folder(f' "{tmp_path / "my cats"}" ') == tmp_path / "my cats"
    assert folders.dataset_folder("\u201ccats\u201d") == host_folder / "input" / "cats"
    assert folders.dataset_folder("~/Bilder/müde") == tmp_path / "Bilder" / "müde"
    assert folders.dataset_folder("  ") == host_folder / "input"


def test_every_edit_of_a_folder_is_noticed(tmp_path):
    (tmp_path / "10_cat").mkdir()
    (tmp_path / "10_cat" / "a.png").write_bytes(b"a")
    states = [folders.folder_state(tmp_path)]
    (tmp_path / "10_cat" / "a.txt").write_text("a cat")
    states.append(folders.folder_state(tmp_path))
    (tmp_path / "10_cat" / "a.txt").write_text("a dog")
    os.utime(tmp_path / "10_cat" / "a.txt", ns=(1, 1))
    states.append(folders.folder_state(tmp_path))
    (tmp_path / "10_cat" / "a.png").unlink()
    states.append(folders.folder_state(tmp_path))
    assert all(one != other for i, one in enumerate(states) for other in states[:i])
    assert folders.folder_state(tmp_path) == states[-1]
    assert folders.folder_state(tmp_path / "gone") == []


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mix", "mix.safetensors"),
        (" mix.safetensors ", "mix.safetensors"),
        ("people/anna v1.5", "people/anna v1.5.safetensors"),
        ("people\\müde", "people/müde.safetensors"),
    ],
)
def test_a_new_lora_lies_in_the_loras_folder(loras, name, expected):
    assert folders.new_lora_path(name) == loras / expected


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".",
        "..",
        "../x",
        "people/../../x",
        "a/..",
        "/etc/x",
        "C:\\x",
        "C:x",
        "\\\\server\\share\\x",
        "a\0b",
        "a\nb",
    ]
    + ["con", "people/NUL", "com1.x", ".hidden", "a:b", 'a"b', "a|b", "what?", "folder /x", "a.", "\ud800", "x" * 300],
)
def test_a_new_lora_never_leaves_the_loras_folder(loras, name):
    with pytest.raises(ValueError, match="cannot be the name of a LoRA file"):
        folders.new_lora_path(name)
