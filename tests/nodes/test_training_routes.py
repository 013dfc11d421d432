"""The HTTP routes of the training on a node: what they do, and what they refuse."""

import asyncio
import json

import folder_paths
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from safetensors.torch import save_file

from lora_workbench.nodes.host import live, routes
from lora_workbench.nodes.host.controls import ACTIONS, Controls
from lora_workbench.nodes.host.live import LiveRun

pytestmark = pytest.mark.comfy
ADDRESS = "/lora_workbench/training"


@pytest.fixture
def ask():
    """(status, answer) of a request to the routes on a server of their own."""
    live._runs.clear()
    loop, table = asyncio.new_event_loop(), web.RouteTableDef()
    routes.add_training(table)
    app = web.Application()
    app.add_routes(table)
    client = TestClient(TestServer(app, loop=loop), loop=loop)
    loop.run_until_complete(client.start_server())

    def asked(method, path, **request):
        async def answer():
            async with client.request(method, path, **request) as response:
                return response.status, json.loads(await response.text())

        return loop.run_until_complete(answer())

    yield asked
    loop.run_until_complete(client.close())
    loop.close()


@pytest.mark.parametrize("node", ["7", "2:1"])
@pytest.mark.parametrize("action", ACTIONS)
def test_every_request_reaches_the_training_on_its_node(ask, node, action):
    with Controls(node) as asked, Controls("1"):
        status, answer = ask("POST", f"{ADDRESS}/{node}/{action}")
        assert (status, answer) == (200, {"node_id": node, "asked": action})
        assert asked.asked() == ([action] if action in ("finish", "save", "preview") else [])
        assert asked.paused() == (action == "pause")


@pytest.mark.parametrize("action", ACTIONS)
def test_a_node_that_is_not_training_is_refused_in_a_sentence(ask, action):
    status, answer = ask("POST", f"{ADDRESS}/7/{action}")
    assert status == 409
    assert answer["error"] == f"Node 7 is not training now, so there is nothing to {action}: queue it first."
    with Controls("7") as asked:
        assert asked.asked() == [] and not asked.paused()


def test_what_makes_no_sense_during_a_pause_is_refused(ask):
    with Controls("7"):
        assert ask("POST", f"{ADDRESS}/7/pause")[0] == 200
        status, answer = ask("POST", f"{ADDRESS}/7/preview")
        assert status == 409 and "is paused: continue first" in answer["error"]


def test_an_unknown_request_is_named(ask):
    with Controls("7"):
        status, answer = ask("POST", f"{ADDRESS}/7/explode")
    assert status == 404 and "'explode' is nothing a training can be asked: use finish, save" in answer["error"]


def test_a_name_that_is_longer_than_a_file_can_be_called_has_a_panel_too(ask):
    with LiveRun("7", "x" * 200):
        status, state = ask("GET", f"{ADDRESS}/7", params={"name": "x" * 200})
    assert (status, state["status"]) == (200, "preparing")


def test_the_state_of_a_node_is_that_of_its_run_of_that_name(ask):
    with LiveRun("2:1", "star") as run:
        run.phase("Encoding pictures", 3, 8)
        for query in ({}, {"name": "star"}):
            status, state = ask("GET", f"{ADDRESS}/2:1", params=query)
            assert status == 200 and (state["phase"], state["done"], state["of"]) == ("Encoding pictures", 3, 8)
        for path, query in (("2:1", {"name": "moon"}), ("7", {})):
            status, state = ask("GET", f"{ADDRESS}/{path}", params=query)
            assert status == 200 and state["status"] == "idle"


@pytest.mark.parametrize(
    ("path", "query", "sentence"),
    [("x" * 101, {}, "node_id must be"), ("7", {"name": "x" * 1001}, "name must be the name of a LoRA")],
)
def test_values_of_the_wrong_kind_are_refused(ask, path, query, sentence):
    status, answer = ask("GET", f"{ADDRESS}/{path}", params=query)
    assert status == 400 and sentence in answer["error"]


@pytest.mark.parametrize("body", ["", "{", "[]", "{}", '{"node_id": 7}', '{"node_id": ""}'])
def test_the_old_route_to_finish_refuses_what_names_no_node(ask, body):
    headers = {"Content-Type": "application/json"}
    status, answer = ask("POST", "/lora_workbench/finish", data=body, headers=headers)
    assert status == 400 and "node_id must be" in answer["error"]


def test_the_old_route_finishes_and_says_so_when_nothing_trains(ask):
    body = {"node_id": "7"}
    status, answer = ask("POST", "/lora_workbench/finish", json=body)
    assert status == 409 and "not training now" in answer["error"]
    with Controls("7") as asked:
        assert not asked.take("finish")
        assert ask("POST", "/lora_workbench/finish", json=body) == (200, {"finishing": "7"})
        assert asked.take("finish")


@pytest.mark.parametrize("headers", [{"Origin": "https://elsewhere.example"}, {"Sec-Fetch-Site": "cross-site"}])
def test_pages_of_other_sites_are_refused(ask, headers):
    with Controls("7") as asked:
        for method, path in (
            ("POST", f"{ADDRESS}/7/finish"),
            ("GET", f"{ADDRESS}/7"),
            ("POST", "/lora_workbench/finish"),
        ):
            status, answer = ask(method, path, headers=headers)
            assert status == 403 and "own page" in answer["error"], path
        assert asked.asked() == []


@pytest.fixture
def lora(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    told = {
        "lora_workbench.workflow": json.dumps(
            {"3": {"class_type": "LoraWorkbenchTrainer", "inputs": {"name": "star"}}}
        ),
        "lora_workbench.node": "3",
        "lora_workbench.settings": json.dumps({"train": {"steps": 740}}),
    }
    save_file({"a": torch.ones(1)}, tmp_path / "star.safetensors", told)
    save_file({"a": torch.ones(1)}, tmp_path / "silent.safetensors")
    return "star.safetensors"


def test_the_graph_that_made_a_file_is_handed_out(ask, lora):
    status, graph = ask("GET", "/lora_workbench/workflow", params={"lora": lora, "name": "again"})
    assert status == 200
    assert graph["3"]["inputs"] == {"name": "again", "steps": 740, "resume": "continue"}


@pytest.mark.parametrize("name", ["", "gone.safetensors", "../star.safetensors", "/etc/passwd", "silent.safetensors"])
def test_a_graph_that_cannot_be_told_is_refused_in_a_sentence(ask, lora, name):
    status, answer = ask("GET", "/lora_workbench/workflow", params={"lora": name})
    assert status == 404 and answer["error"].endswith(".")
