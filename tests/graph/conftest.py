"""A real ComfyUI server with the pack and the toy world installed, one for all graph tests."""

from pathlib import Path

import comfy_server
import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKS = {"comfyui-lora-workbench": ROOT, "toyworld": ROOT / "tests" / "toyworld" / "node_pack"}


@pytest.fixture(scope="session")
def server(comfyui, tmp_path_factory):
    """A running `comfy_server.Server`; it fails here, with ComfyUI's log, when a node pack cannot be imported."""
    with comfy_server.running(comfyui, tmp_path_factory.mktemp("comfyui"), PACKS) as server:
        yield server


@pytest.fixture(scope="session")
def object_info(server):
    """The schema of every node, as the frontend sees it."""
    return server.object_info()
