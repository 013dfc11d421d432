"""A real ComfyUI server with the pack and the toy world installed, one for all graph tests."""

import comfy_server
import example
import pytest


@pytest.fixture(scope="session")
def server(comfyui, tmp_path_factory):
    """A running `comfy_server.Server`; it fails here, with ComfyUI's log, when a node pack cannot be imported."""
    with comfy_server.running(comfyui, tmp_path_factory.mktemp("comfyui"), example.PACKS) as server:
        yield server


@pytest.fixture(scope="session")
def object_info(server):
    """The schema of every node, as the frontend sees it."""
    return server.object_info()
