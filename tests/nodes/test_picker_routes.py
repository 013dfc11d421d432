"""The HTTP routes of the Picker on a node: choose, keep, delete, ask again, and what they refuse."""

import asyncio
import json
import threading

import comfy.model_management as mm
import folder_paths
import pytest
import torch
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image
from safetensors.torch import save_file

from lora_workbench.nodes.host import choice, picker_routes, routes
from lora_workbench.nodes.host.choice import Choice

pytestmark = pytest.mark.comfy
ADDRESS = "/lora_workbench/picker"
STEPS = (2, 4, 6)


def named(step) -> str:
    return f"star/star_{step}.safetensors"


@pytest.fixture
def ask():
    """(status, answer) of a request to the routes on a server of their own, while other threads do their work."""
    choice._choices.clear()
    loop, table = asyncio.new_event_loop(), web.RouteTableDef()
    picker_routes.register(table)
    app = web.Application()
    app.add_routes(table)
    client = TestClient(TestServer(app, loop=loop), loop=loop)
    loop.run_until_complete(client.start_server())

    def asked(method, path, json_body=None, **request):
        async def answer():
            async with client.request(method, f"{ADDRESS}/{path}", json=json_body, **request) as response:
                return response.status, json.loads(await response.text())

        return loop.run_until_complete(asyncio.wait_for(answer(), 10))

    yield asked
    loop.run_until_complete(client.close())
    loop.close()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A run of three files, one of another run, and one outside of the loras folder."""
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    folder = tmp_path / "loras"
    for name in (*map(named, STEPS), "moon/moon_2.safetensors", "../out.safetensors"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_file({"a": torch.full((len(name),), float(len(name)))}, folder / name)
    for step in STEPS:
        save_file({"a": torch.full((4,), float(step))}, folder / named(step))
        Image.new("RGB", (8, 8), (step, 0, 0)).save(folder / f"star/star_{step}.preview.png")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(folder)], {".safetensors"}))
    return folder


def files(**broken) -> list[dict]:
    return [{"lora": named(step), "step": step, "broken": broken.get(f"step_{step}", "")} for step in STEPS]


@pytest.fixture
def shown(folder):
    """The Picker on node 7, which measures."""
    with Choice("7", "star") as shown:
        shown.files(files())
        yield shown


@pytest.fixture
def picked(shown):
    """The Picker on node 7 once it has picked step 4."""
    shown.picked(named(4))
    return shown


def size(folder, *names) -> int:
    return sum((folder / name).stat().st_size for name in names)


def everything(folder) -> dict:
    return {str(path): path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}


class Queued(threading.Thread):
    """A node that asks in the executor's thread."""

    def __init__(self, shown, minutes=0.0) -> None:
        super().__init__(daemon=True)
        self.shown, self.minutes, self.chosen = shown, minutes, None
        self.start()

    def run(self) -> None:
        try:
            self.chosen = self.shown.ask(named(6), self.minutes)
        except mm.InterruptProcessingException:
            self.chosen = "cancelled"

    def ended(self):
        self.join(5)
        return self.chosen


def until_asking(ask) -> dict:
    for _ in range(500):
        _, state = ask("GET", "7")
        if state["status"] == "asking":
            return state
    raise AssertionError("the node never asked")


def test_the_state_of_a_node_is_answered_also_when_it_never_ran(ask, shown):
    status, state = ask("GET", "7")
    assert (status, state["status"], state["name"]) == (200, "measuring", "star")
    assert [entry["lora"] for entry in state["files"]] == [named(step) for step in STEPS]
    status, state = ask("GET", "2:1")
    assert (status, state["status"], state["node_id"], state["files"]) == (200, "idle", "2:1", [])


def test_what_the_user_chooses_by_http_is_what_the_waiting_node_gets(ask, shown):
    queued = Queued(shown, minutes=1)
    assert 50 < until_asking(ask)["seconds_left"] <= 60
    assert ask("POST", "7/choose", {"lora": named(2)}) == (200, {"node_id": "7", "chosen": named(2)})
    assert queued.ended() == named(2)
    status, answer = ask("POST", "7/choose", {"lora": named(4)})
    assert status == 409 and answer["error"].startswith("Node 7 is not asking now")


@pytest.mark.parametrize("action", ["choose", "keep", "delete"])
def test_what_was_meant_for_another_picking_of_that_node_number_changes_nothing(ask, picked, folder, action):
    """Two workflows may each have a Picker on node 7; a page that lost its connection shows the one before."""
    others = {"loras": [named(2), named(6)], "bytes": size(folder, named(2), named(6))}
    body, before = (
        {"choose": {"lora": named(2)}, "keep": {"lora": named(4)}, "delete": others}[action],
        everything(folder),
    )
    with Choice("7", "star") as newer:
        newer.files(files())
        newer.picked(named(4))
        status, answer = ask("POST", f"7/{action}", {**body, "id": picked.id})
        assert (status, answer["error"]) == (409, "Node 7 has begun another picking since: look at its list again.")
        assert everything(folder) == before
        assert action == "choose" or ask("POST", f"7/{action}", {**body, "id": newer.id})[0] == 200


def test_nothing_can_be_chosen_on_a_node_that_does_not_ask(ask, shown):
    for node, sentence in (("7", "Node 7 is not asking now"), ("8", "Node 8 has not picked since ComfyUI started")):
        status, answer = ask("POST", f"{node}/choose", {"lora": named(2)})
        assert status == 409 and answer["error"].startswith(sentence)


def test_after_cancel_and_after_the_time_is_over_it_is_too_late_to_choose(ask, shown):
    queued = Queued(shown)
    until_asking(ask)
    mm.interrupt_current_processing()
    assert queued.ended() == "cancelled"
    assert Queued(shown, minutes=0.01 / 60).ended() == named(6)
    assert ask("POST", "7/choose", {"lora": named(2)})[0] == 409
    assert ask("GET", "7")[1]["message"].startswith("Nobody chose within")


@pytest.mark.parametrize("lora", ["moon/moon_2.safetensors", "../out.safetensors", "star/../star/star_2.safetensors"])
def test_only_files_of_this_node_can_be_chosen_or_kept(ask, shown, folder, lora):
    queued, before = Queued(shown), everything(folder)
    until_asking(ask)
    for action in ("choose", "keep"):
        status, answer = ask("POST", f"7/{action}", {"lora": lora})
        assert status == 409 and "is none of the files of node 7" in answer["error"]
    assert queued.is_alive() and everything(folder) == before
    ask("POST", "7/choose", {"lora": named(2)})
    assert queued.ended() == named(2)


def test_a_broken_file_can_be_neither_chosen_nor_kept(ask, shown):
    shown.files(files(step_2="it holds NaN"))
    queued = Queued(shown)
    until_asking(ask)
    for action in ("choose", "keep"):
        status, answer = ask("POST", f"7/{action}", {"lora": named(2)})
        assert status == 409 and "(it holds NaN)" in answer["error"]
    ask("POST", "7/choose", {"lora": named(4)})
    assert queued.ended() == named(4)


def test_keep_copies_the_file_and_its_cover_under_the_runs_name_and_says_so(ask, picked, folder):
    (folder / "star.safetensors").write_bytes(b"mine")
    before = everything(folder)
    for _ in range(2):
        assert ask("POST", "7/keep", {"lora": named(4)}) == (200, {"kept": "star_v2.safetensors"})
    assert (folder / "star_v2.safetensors").read_bytes() == (folder / named(4)).read_bytes()
    assert (folder / "star_v2.preview.png").read_bytes() == (folder / "star/star_4.preview.png").read_bytes()
    after = everything(folder)
    assert len(after) == len(before) + 2 and all(after[path] == data for path, data in before.items())
    assert [entry["kept"] for entry in ask("GET", "7")[1]["files"]] == [False, True, False]


def test_without_a_cover_the_file_is_kept_with_its_picture_of_the_grid(ask, picked, folder, tmp_path):
    (folder / "star/star_6.preview.png").unlink()
    Image.new("RGB", (8, 8), "green").save(tmp_path / "cell.png")
    picked.cell(named(6), 0.6, 0, folder / "star/star_2.preview.png")
    picked.cell(named(6), 1.0, 0, tmp_path / "cell.png")
    assert ask("POST", "7/keep", {"lora": named(6)})[0] == 200
    assert (folder / "star.preview.png").read_bytes() == (tmp_path / "cell.png").read_bytes()


def test_the_others_are_deleted_with_their_covers_and_are_off_the_list(ask, picked, folder):
    others = [named(2), named(6)]
    shown_size = sum(entry["bytes"] for entry in ask("GET", "7")[1]["files"] if entry["lora"] in others)
    assert shown_size == size(folder, *others)
    answer = ask("POST", "7/delete", {"loras": others, "bytes": shown_size})
    assert answer == (200, {"deleted": others, "bytes": shown_size})
    assert sorted(path.name for path in (folder / "star").iterdir()) == ["star_4.preview.png", "star_4.safetensors"]
    assert [entry["lora"] for entry in ask("GET", "7")[1]["files"]] == [named(4)]


REFUSED = {
    "the pick": ([named(2), named(4)], "is picked, so it is not deleted"),
    "another run's": ([named(2), "moon/moon_2.safetensors"], "none of the files of node 7"),
    "outside": ([named(2), "../out.safetensors"], "none of the files of node 7"),
    "a way round": (["star/../star/star_2.safetensors"], "none of the files of node 7"),
    "absolute": (["{folder}/star/star_2.safetensors"], "none of the files of node 7"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_may_not_be_deleted_stays_and_so_does_all_that_was_named_with_it(ask, picked, folder, case):
    names, sentence = REFUSED[case]
    names, before = [name.format(folder=folder) for name in names], everything(folder)
    total = sum((folder / name).stat().st_size for name in names)
    status, answer = ask("POST", "7/delete", {"loras": names, "bytes": total})
    assert status == 409 and sentence in answer["error"] and answer["error"].endswith(".")
    assert everything(folder) == before


def test_a_kept_file_is_not_deleted_nor_is_the_pick_of_another_node(ask, picked, folder):
    with Choice("9", "star") as other:
        other.files(files())
        other.picked(named(6))
    ask("POST", "7/keep", {"lora": named(2)})
    before = everything(folder)
    for step, sentence in ((2, "is kept"), (6, "is picked")):
        status, answer = ask("POST", "7/delete", {"loras": [named(step)], "bytes": size(folder, named(step))})
        assert status == 409 and f"'{named(step)}' {sentence}, so it is not deleted" in answer["error"]
    assert everything(folder) == before


def test_files_that_are_not_what_the_page_showed_are_not_deleted(ask, picked, folder):
    total = size(folder, named(2), named(6))
    save_file({"a": torch.ones(40)}, folder / named(6))
    before = everything(folder)
    status, answer = ask("POST", "7/delete", {"loras": [named(2), named(6)], "bytes": total})
    assert status == 409 and f"not the {total} that were shown, so nothing was deleted" in answer["error"]
    assert everything(folder) == before
    shown_size = sum(entry["bytes"] for entry in ask("GET", "7")[1]["files"] if entry["lora"] != named(4))
    assert ask("POST", "7/delete", {"loras": [named(2), named(6)], "bytes": shown_size})[0] == 200


def test_nothing_is_deleted_before_the_node_has_picked(ask, shown, folder):
    before = everything(folder)
    status, answer = ask("POST", "7/delete", {"loras": [named(2)], "bytes": size(folder, named(2))})
    assert status == 409 and "has picked nothing yet" in answer["error"] and everything(folder) == before


@pytest.mark.parametrize(
    ("action", "body"),
    [
        ("choose", {}),
        ("choose", {"lora": None}),
        ("keep", {"lora": ""}),
        ("keep", {"lora": "a\0b"}),
        ("keep", {"lora": "x" * 2000}),
        ("delete", {}),
        ("delete", {"loras": [], "bytes": 0}),
        ("delete", {"loras": named(2), "bytes": 0}),
        ("delete", {"loras": [named(2), 7], "bytes": 0}),
        ("delete", {"loras": [named(2), named(2)], "bytes": 0}),
        ("delete", {"loras": [named(2)], "bytes": "12"}),
        ("delete", {"loras": [named(2)], "bytes": True}),
        ("delete", {"loras": [named(2)]}),
    ],
)
def test_values_of_the_wrong_kind_are_refused_in_a_sentence(ask, picked, folder, action, body):
    before = everything(folder)
    status, answer = ask("POST", f"7/{action}", body)
    assert status == 400 and answer["error"].endswith(".") and everything(folder) == before


def test_to_ask_again_changes_what_the_node_depends_on(ask):
    before = choice.times_asked_again("7")
    assert ask("POST", "7/again") == (200, {"node_id": "7", "asked": "again"})
    assert choice.times_asked_again("7") == before + 1


@pytest.mark.parametrize("headers", [{"Origin": "https://elsewhere.example"}, {"Sec-Fetch-Site": "cross-site"}])
def test_pages_of_other_sites_are_refused(ask, picked, folder, headers):
    before, again = everything(folder), choice.times_asked_again("7")
    bodies = {
        "choose": {"lora": named(2)},
        "keep": {"lora": named(2)},
        "delete": {"loras": [named(2)], "bytes": size(folder, named(2))},
        "again": {},
    }
    for action, body in bodies.items():
        status, answer = ask("POST", f"7/{action}", body, headers=headers)
        assert status == 403 and "own page" in answer["error"], action
    assert ask("GET", "7", headers=headers)[0] == 403
    assert everything(folder) == before and choice.times_asked_again("7") == again


def test_the_routes_are_among_those_that_the_pack_opens(monkeypatch):
    class Server:
        routes = web.RouteTableDef()

    monkeypatch.setattr(routes, "PromptServer", type("PromptServer", (), {"instance": Server}))
    routes.register()
    opened = {(route.method, route.path) for route in Server.routes}
    posts = {("POST", f"{picker_routes.ADDRESS}/{action}") for action in ("choose", "keep", "delete", "again")}
    assert {("GET", picker_routes.ADDRESS), *posts} <= opened
    with pytest.raises(RuntimeError, match="installed twice, so the copy in '.+' is left out: delete one"):
        routes.register()
