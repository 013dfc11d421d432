"""What several tests of nodes begin with."""

from pathlib import Path

import pytest


@pytest.fixture
def trainer(kind, tmp_path, monkeypatch, comfyui):
    """A Trainer on models of this kind, which tests share, in folders of its own."""
    import queueing

    return queueing.trainer(kind, tmp_path, monkeypatch, models=queueing.shared_models(kind))


@pytest.fixture
def folder(tmp_path, monkeypatch, comfyui) -> Path:
    """The folder of LoRA files, with none in it yet."""
    import folder_paths

    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    return tmp_path


@pytest.fixture
def reads(monkeypatch, comfyui) -> list[str]:
    """The LoRA files that were read, by name."""
    from lora_workbench.nodes.host import loras

    read, real = [], loras.read_file
    monkeypatch.setattr(loras, "read_file", lambda path: read.append(path.name) or real(path))
    return read
