"""The HTTP route that tells the panel about a LoRA file: what the file says, and what is refused."""

import asyncio
import json

import folder_paths
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image
from safetensors.torch import save_file
from stacktoys import LOHA, write

from lora_workbench.nodes.host import lora_routes
from lora_workbench.training.description import STRENGTH, add_cover

pytestmark = pytest.mark.comfy
PREVIEWS = "/experiment/models/preview/loras/0/"


@pytest.fixture
def folder(tmp_path, monkeypatch, comfyui):
    folder = tmp_path / "loras"
    folder.mkdir()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors", ".pt"}))
    return folder


@pytest.fixture
def ask():
    """(status, answer) of a request to the route on a server of its own."""
    loop, table = asyncio.new_event_loop(), web.RouteTableDef()
    lora_routes.register(table)
    app = web.Application()
    app.add_routes(table)
    client = TestClient(TestServer(app, loop=loop), loop=loop)
    loop.run_until_complete(client.start_server())

    def asked(name, **request):
        async def answer():
            async with client.get(lora_routes.ADDRESS, params={"name": name}, **request) as response:
                return response.status, json.loads(await response.text())

        return loop.run_until_complete(asyncio.wait_for(answer(), 10))

    yield asked
    loop.run_until_complete(client.close())
    loop.close()


def test_it_tells_family_rank_trigger_words_and_strength(folder, ask):
    said = {"modelspec.trigger_phrase": "zork", STRENGTH: "0.85", "ss_base_model_version": "sdxl_base_v1-0"}
    write(folder, "people/a.safetensors", "sdxl", metadata=said, every=40)
    assert ask("people/a.safetensors") == (
        200,
        {
            "name": "people/a.safetensors",
            "family": "sdxl",
            "rank": 3,
            "triggers": ["zork"],
            "strength": 0.85,
            "size": (folder / "people/a.safetensors").stat().st_size,
            "preview": None,
            "error": "",
        },
    )


def test_what_a_file_does_not_say_is_null_and_its_layers_tell_the_family(folder, ask):
    write(folder, "a.safetensors", "flux", metadata={}, adapters=(LOHA,), every=10)
    _, told = ask("a.safetensors")
    assert (told["family"], told["rank"], told["triggers"], told["strength"]) == ("flux", 3, [], None)


def test_a_file_that_was_moved_is_told_by_the_name_it_has_now(folder, ask):
    write(folder, "new/a.safetensors", "flux", every=40)
    assert ask("old\\a.safetensors")[1]["name"] == "new/a.safetensors"


def test_a_file_that_was_written_anew_is_read_anew(folder, ask):
    write(folder, "a.safetensors", "flux", every=40)
    assert ask("a.safetensors")[1]["strength"] is None
    write(folder, "a.safetensors", "flux", metadata={STRENGTH: "0.5"}, every=40)
    assert ask("a.safetensors")[1]["strength"] == 0.5


@pytest.mark.parametrize("where", ["beside it", "in it"])
def test_a_picture_is_served_by_comfyui(where, folder, ask):
    write(folder, "people/big star.safetensors", "flux", every=40)
    picture = Image.new("RGB", (8, 8))
    if where == "in it":
        add_cover(folder / "people/big star.safetensors", picture)
    else:
        picture.save(folder / "people/big star.preview.png")
    assert ask("people/big star.safetensors")[1]["preview"] == f"{PREVIEWS}people/big%20star.safetensors"


@pytest.mark.parametrize("data", [b"", b"not a LoRA at all", b"\xff" * 64, (1 << 40).to_bytes(8, "little") + b"{}"])
def test_a_file_that_cannot_be_read_says_so_and_nothing_else(data, folder, ask):
    (folder / "a.safetensors").write_bytes(data)
    status, told = ask("a.safetensors")
    assert status == 200 and told["error"].startswith("The LoRA file 'a.safetensors' cannot be read: ")
    assert (told["family"], told["rank"], told["triggers"]) == (None, None, [])


@pytest.mark.parametrize("shape", [[0, 1 << 62, 1 << 62], [(1 << 64) - 1, 0], [0, -1], [0, "a"]])
def test_a_file_with_shapes_that_no_tensor_has_is_answered_too(shape, folder, ask):
    header = {"a.lora_down.weight": {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]}}
    data = json.dumps(header).encode()
    (folder / "a.safetensors").write_bytes(len(data).to_bytes(8, "little") + data)
    status, told = ask("a.safetensors")
    assert status == 200 and told["rank"] is None
    save_file(
        {"a.lora_down.weight": torch.zeros(0, 4), "a.lora_up.weight": torch.zeros(0, 0)}, folder / "a.safetensors"
    )
    assert ask("a.safetensors")[0] == 200


def test_another_format_is_listed_and_says_nothing(folder, ask):
    torch.save({"a": torch.zeros(1)}, folder / "a.pt")
    status, told = ask("a.pt")
    assert status == 200 and (told["error"], told["rank"]) == ("", None)


@pytest.mark.parametrize("name", ["gone.safetensors", "../secret.safetensors", "/etc/passwd", "C:\\a.safetensors"])
def test_what_is_no_lora_file_is_404_and_a_sentence(name, folder, ask):
    (folder.parent / "secret.safetensors").touch()
    status, answer = ask(name)
    assert status == 404 and answer.keys() == {"error"} and answer["error"].endswith(".")


@pytest.mark.parametrize("name", ["", "a" * 1001])
def test_a_name_has_a_length(name, ask):
    assert ask(name)[0] == 400


def test_pages_of_other_sites_are_refused(folder, ask):
    assert ask("a.safetensors", headers={"Origin": "https://elsewhere.example"})[0] == 403
