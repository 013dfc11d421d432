"""The caption review's HTTP routes: what they do, and what they refuse."""

import asyncio
import io
import json
import os
import threading

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from PIL import Image

from lora_workbench.captioning.sidecar import CaptionStore
from lora_workbench.nodes.host import requests, review

pytestmark = pytest.mark.comfy

CAPTIONS = {"a": "a red hat, smile", "b": "a red hat, frown", "c": "a blue coat"}
OUTSIDE = "nobody may read this"


@pytest.fixture
def folder(tmp_path):
    """Four pictures, three with captions; beside the folder a picture and a text that must not be reached."""
    inside = tmp_path / "my pictures"
    (inside / "2_more").mkdir(parents=True)
    for name in ("a", "b", "c", "2_more/d"):
        Image.new("RGB", (64, 48), "red").save(inside / f"{name}.png")
    for name, caption in CAPTIONS.items():
        (inside / f"{name}.txt").write_text(caption + "\n", encoding="utf-8")
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "secret.txt").write_text(OUTSIDE, encoding="utf-8")
    return inside


class Site:
    """The routes on a server of their own."""

    def __init__(self, loop, client):
        self.loop, self.client, self.token = loop, client, ""

    def ask(self, method, path, **request):
        """(status, answer) of one request; a JSON answer as an object, others as (headers, bytes)."""

        async def asked():
            async with self.client.request(method, f"{review.ADDRESS}/{path}", **request) as response:
                body = await response.read()
                if response.content_type == "application/json":
                    return response.status, json.loads(body)
                return response.status, (response.headers, body)

        return self.loop.run_until_complete(asked())

    def get(self, path, **query):
        return self.ask("GET", f"{self.token}/{path}", params=query)

    def post(self, path, **body):
        return self.ask("POST", f"{self.token}/{path}", json=body)

    def open(self, folder, **body):
        status, answer = self.ask("POST", "open", json={"folder": str(folder), **body})
        self.token = answer.get("token", "")
        return status, answer

    def pictures(self):
        status, answer = self.get("pictures")
        assert status == 200, answer
        return {picture["name"]: picture for picture in answer["pictures"]}

    def save(self, name, caption, seen, reviewed=False):
        return self.post("caption", name=name, caption=caption, seen=seen, reviewed=reviewed)

    def replace(self, find, replacement, preview, whole_words=True, match_case=False):
        flags = {"whole_words": whole_words, "match_case": match_case, "preview": preview}
        return self.post("replace", find=find, replacement=replacement, **flags)


@pytest.fixture
def site():
    loop, routes = asyncio.new_event_loop(), web.RouteTableDef()
    review.register(routes)
    app = web.Application(client_max_size=100 * 1024**2)
    app.add_routes(routes)
    client = TestClient(TestServer(app, loop=loop), loop=loop)
    loop.run_until_complete(client.start_server())
    yield Site(loop, client)
    loop.run_until_complete(client.close())
    loop.close()


@pytest.fixture
def opened(site, folder):
    assert site.open(folder)[0] == 200
    return site


def caption(folder, name):
    return (folder / f"{name}.txt").read_text(encoding="utf-8")


# Opening and looking


def test_an_opened_folder_lists_its_pictures_with_captions_states_and_tokens(opened, folder):
    with CaptionStore() as store:
        store.write(folder / "c.png", "a blue coat, long", state="automatic")
    pictures = opened.pictures()
    assert list(pictures) == ["2_more/d.png", "a.png", "b.png", "c.png"]
    assert [picture["state"] for picture in pictures.values()] == ["missing", "yours", "yours", "automatic"]
    assert pictures["a.png"]["caption"] == CAPTIONS["a"] and pictures["a.png"]["tokens"] == 5
    assert opened.get("pictures")[1]["limit"] == 75
    assert pictures["2_more/d.png"]["caption"] == "" and pictures["2_more/d.png"]["tokens"] == 0


def test_the_trigger_word_counts_among_the_tokens(site, folder):
    site.open(folder)
    without = site.pictures()["a.png"]["tokens"]
    site.open(folder, trigger_word="zork")
    assert site.pictures()["a.png"]["tokens"] > without
    empty, trigger = (site.post("tokens", name="a.png", caption=caption)[1] for caption in ("", "zork"))
    assert empty == trigger


def test_a_folder_may_be_typed_with_quotes_or_inside_the_input_folder(site, folder, host_folder):
    assert site.open(f'"{folder}"')[1]["folder"] == str(folder)
    Image.new("RGB", (8, 8)).save(host_folder / "input" / "typed.png")
    assert site.open(".")[1]["folder"] == str(host_folder / "input")


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [("", "No folder is given"), ("nowhere", "does not exist"), ("a\0b", "must be a text"), (7, "must be a text")],
)
def test_a_folder_that_cannot_be_opened_is_named(site, typed, sentence):
    status, answer = site.ask("POST", "open", json={"folder": typed})
    assert status == 400 and sentence in answer["error"]


def test_every_opening_has_a_token_of_its_own_and_old_ones_are_forgotten(site, folder):
    tokens = [site.open(folder)[1]["token"] for _ in range(review.MOST_FOLDERS + 1)]
    assert len(set(tokens)) == len(tokens) and min(map(len, tokens)) >= 32
    site.token = tokens[0]
    assert site.get("pictures")[0] == 410
    site.token = tokens[1]
    assert site.get("pictures")[0] == 200


def test_a_thumbnail_is_small_upright_and_kept_by_the_browser(opened, folder):
    sideways = Image.new("RGB", (4000, 2000), "blue")
    exif = Image.Exif()
    exif[0x0112] = 6
    sideways.save(folder / "e.jpg", exif=exif)
    status, (headers, body) = opened.get("picture", name="e.jpg", size="small")
    assert status == 200 and headers["Content-Type"] == "image/jpeg"
    assert "max-age" in headers["Cache-Control"] and "private" in headers["Cache-Control"]
    assert Image.open(io.BytesIO(body)).size == (160, 320)
    assert Image.open(io.BytesIO(opened.get("picture", name="e.jpg", size="large")[1][1])).size == (640, 1280)
    version = opened.pictures()["e.jpg"]["version"]
    sideways.resize((40, 20)).save(folder / "e.jpg")
    assert opened.pictures()["e.jpg"]["version"] != version


def test_a_broken_picture_and_a_size_that_is_not_offered_are_named(opened, folder):
    (folder / "broken.png").write_bytes(b"no picture")
    status, answer = opened.get("picture", name="broken.png", size="small")
    assert status == 400 and "broken.png cannot be read" in answer["error"]
    assert opened.get("picture", name="a.png", size="4000")[0] == 400


def test_files_are_read_off_the_event_loop(opened, folder, monkeypatch):
    threads = set()
    monkeypatch.setattr(CaptionStore, "state", lambda self, image: threads.add(threading.current_thread().name))
    opened.pictures()
    assert threads and all(name.startswith("caption-review") for name in threads)


# Changing captions


def test_a_saved_caption_is_on_the_disk_and_yours(opened, folder):
    status, answer = opened.save("a.png", "  a grün hat\r\nwith a brim ", CAPTIONS["a"])
    assert status == 200 and answer["picture"]["state"] == "yours" and answer["undo"]
    assert (folder / "a.txt").read_bytes() == "a grün hat\nwith a brim\n".encode()
    assert opened.get("caption", name="a.png")[1] == {**answer["picture"], "previous": CAPTIONS["a"]}


def test_an_accepted_caption_is_reviewed_and_its_file_untouched(opened, folder):
    before = (folder / "a.txt").stat()
    assert opened.save("a.png", CAPTIONS["a"], CAPTIONS["a"], reviewed=True)[1]["picture"]["state"] == "reviewed"
    assert (folder / "a.txt").stat() == before
    assert opened.pictures()["a.png"]["state"] == "reviewed"
    (folder / "a.txt").write_text("edited elsewhere")
    assert opened.pictures()["a.png"]["state"] == "yours"


def test_a_caption_that_changed_meanwhile_is_not_overwritten(opened, folder):
    (folder / "a.txt").write_text("written by another", encoding="utf-8")
    status, answer = opened.save("a.png", "mine", CAPTIONS["a"])
    assert status == 409 and "changed meanwhile" in answer["error"]
    assert answer["picture"]["caption"] == "written by another" == caption(folder, "a")
    assert opened.save("a.png", "mine", "written by another")[0] == 200


def test_a_caption_from_a_table_is_shown_and_written_beside_its_picture_when_accepted(opened, folder):
    table = '{"file_name": "2_more/d.png", "text": "from the table"}\n'
    (folder / "metadata.jsonl").write_text(table)
    shown = opened.pictures()["2_more/d.png"]
    assert (shown["caption"], shown["state"]) == ("from the table", "yours")
    assert opened.save("2_more/d.png", "from the table", "from the table")[1]["undo"] is False
    accepted = opened.save("2_more/d.png", "from the table", "from the table", reviewed=True)[1]["picture"]
    assert accepted["state"] == "reviewed" and caption(folder, "2_more/d") == "from the table\n"
    assert (folder / "metadata.jsonl").read_text() == table
    assert opened.post("undo")[1]["pictures"] == [shown]


def test_an_empty_caption_is_refused(opened, folder):
    status, answer = opened.save("a.png", "  \n", CAPTIONS["a"])
    assert status == 400 and "empty" in answer["error"]
    assert caption(folder, "a") == CAPTIONS["a"] + "\n"


def test_replacing_is_shown_before_it_is_done_and_taken_back_to_the_last_byte(opened, folder):
    (folder / "b.txt").write_bytes("\ufeffa red hat\r\nfrown".encode())
    files = {path.name: path.read_bytes() for path in folder.glob("*.txt")}
    status, answer = opened.replace("red hat", "green hat", preview=True)
    assert status == 200 and [change["name"] for change in answer["changes"]] == ["a.png", "b.png"]
    assert answer["changes"][0] == {"name": "a.png", "before": CAPTIONS["a"], "after": "a green hat, smile"}
    assert {path.name: path.read_bytes() for path in folder.glob("*.txt")} == files

    answer = opened.replace("red hat", "green hat", preview=False)[1]
    assert [picture["caption"] for picture in answer["pictures"]] == ["a green hat, smile", "a green hat\nfrown"]
    assert caption(folder, "a") == "a green hat, smile\n" and caption(folder, "c") == CAPTIONS["c"] + "\n"
    assert [picture["name"] for picture in opened.post("undo")[1]["pictures"]] == ["a.png", "b.png"]
    assert {path.name: path.read_bytes() for path in folder.glob("*.txt")} == files


def test_replacing_never_leaves_a_caption_empty(opened, folder):
    (folder / "c.txt").write_text("watermark")
    (folder / "b.txt").write_text("watermark, smile")
    answer = opened.replace("watermark", "", preview=False)[1]
    assert answer["emptied"] == ["c.png"] and caption(folder, "c") == "watermark" and caption(folder, "b") == "smile\n"
    assert opened.replace("", "x", preview=True)[0] == 400


def test_changes_are_taken_back_one_by_one_also_after_opening_the_folder_again(site, folder):
    site.open(folder)
    site.save("a.png", "first", CAPTIONS["a"])
    site.save("2_more/d.png", "second", "")
    site.open(folder)
    assert site.get("pictures")[1]["undo"]
    assert site.post("undo")[1]["pictures"][0]["state"] == "missing" and not (folder / "2_more" / "d.txt").exists()
    undone = site.post("undo")[1]
    assert undone == {"pictures": [site.pictures()["a.png"]], "kept": [], "undo": False}
    assert caption(folder, "a") == CAPTIONS["a"] + "\n"
    assert site.post("undo")[1] == {"pictures": [], "kept": [], "undo": False}


def test_acceptance_is_taken_back_in_its_turn(opened, folder):
    opened.save("a.png", "other words", CAPTIONS["a"])
    opened.save("b.png", CAPTIONS["b"], CAPTIONS["b"], reviewed=True)
    opened.save("c.png", "last words", CAPTIONS["c"], reviewed=True)
    undone = [opened.post("undo")[1]["pictures"][0] for _ in range(3)]
    assert [(picture["name"], picture["state"]) for picture in undone] == [
        ("c.png", "yours"),
        ("b.png", "yours"),
        ("a.png", "yours"),
    ]
    assert {name: caption(folder, name).strip() for name in CAPTIONS} == CAPTIONS


def test_undo_keeps_what_was_edited_since(opened, folder):
    opened.save("a.png", "from the review", CAPTIONS["a"])
    (folder / "a.txt").write_text("edited since")
    assert opened.post("undo")[1] == {"pictures": [], "kept": ["a.txt"], "undo": False}
    assert caption(folder, "a") == "edited since"


# What is refused

READS = [("GET", "pictures"), ("GET", "picture?name=a.png"), ("GET", "caption?name=a.png")]
WRITES = [("POST", path) for path in ("caption", "tokens", "replace", "undo")]
FOREIGN = [
    {"Origin": "https://evil.example"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "null"},
    {"Origin": "http://[bad"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Sec-Fetch-Site": "cross-site", "Origin": "OWN"},
]


@pytest.mark.parametrize("headers", FOREIGN, ids=str)
def test_cross_origin_requests_are_refused_by_every_route(opened, folder, headers):
    own = f"http://{opened.client.host}:{opened.client.port}"
    headers = {name: value.replace("OWN", own) for name, value in headers.items()}
    asked = [(method, f"{opened.token}/{path}") for method, path in READS + WRITES] + [("POST", "open")]
    for method, path in asked:
        body = {"json": {"folder": str(folder)}} if method == "POST" else {}
        status, answer = opened.ask(method, path, headers=headers, **body)
        assert status == 403 and "own page" in answer["error"], path


def test_the_own_page_and_programs_are_answered(opened):
    own = f"http://{opened.client.host}:{opened.client.port}"
    for headers in ({"Origin": own, "Sec-Fetch-Site": "same-origin"}, {"Sec-Fetch-Site": "none"}, {}):
        assert opened.ask("GET", f"{opened.token}/pictures", headers=headers)[0] == 200


@pytest.mark.parametrize(
    ("origin", "host", "own"),
    [
        ("https://comfy.example", "comfy.example", True),
        ("https://comfy.example", "comfy.example:443", True),
        ("http://[::1]:8188", "[::1]:8188", True),
        ("http://comfy.example", "comfy.example:8188", False),
        ("http://comfy.example:8188", "evil.example:8188", False),
        ("file://", "127.0.0.1:8188", False),
    ],
)
def test_an_origin_is_ours_when_host_and_port_agree(origin, host, own):
    assert requests._is_own(origin, host) is own


@pytest.mark.parametrize(("method", "path"), READS + WRITES)
def test_without_the_token_of_an_opened_folder_nothing_is_reached(opened, method, path):
    body = {"json": {"name": "a.png", "caption": "x", "seen": ""}} if method == "POST" else {}
    for token in ("x", opened.token[:-1], opened.token.swapcase(), "..", "%2e%2e"):
        assert opened.ask(method, f"{token}/{path}", **body)[0] in (404, 410)


NAMES = [
    "../secret.png",
    "2_more/../../secret.png",
    "..\\secret.png",
    "./../secret.png",
    "{outside}/secret.png",
    "//secret.png",
    "C:secret.png",
    "~/secret.png",
    "",
    ".",
    "2_more",
    "no such picture.png",
    "x" * 5000 + ".png",
    ".caption_backups/a.png",
]


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:30])
def test_path_traversal_is_refused(opened, folder, name):
    (folder / ".caption_backups").mkdir()
    Image.new("RGB", (8, 8)).save(folder / ".caption_backups" / "a.png")
    name = name.format(outside=folder.parent)
    for status, _ in (
        opened.get("picture", name=name),
        opened.get("caption", name=name),
        opened.save(name, "overwritten", OUTSIDE),
        opened.save(name, "overwritten", ""),
    ):
        assert status == 404
    assert (folder.parent / "secret.txt").read_text() == OUTSIDE
    assert opened.get("picture", name="a.png\0")[0] == 400


@pytest.mark.parametrize("name", ["a.txt", ".caption_log.json", "model.safetensors", "a", "page.html", "vector.svg"])
def test_other_extensions_are_refused(opened, folder, name):
    (folder / name).write_text(OUTSIDE)
    assert opened.get("picture", name=name)[0] == 404
    assert opened.get("caption", name=name)[0] == 404
    assert opened.save(name, "overwritten", "")[0] == 404
    assert (folder / name).read_text() == OUTSIDE and name not in opened.pictures()


def link(place, target):
    try:
        os.symlink(target, place, target_is_directory=target.is_dir())
    except OSError:
        pytest.skip("this system allows no symbolic links")


def test_symlinks_out_of_the_folder_are_refused(opened, folder):
    outside = folder.parent
    link(folder / "picture.png", outside / "secret.png")
    link(folder / "link", outside)
    link(folder / "inner.png", folder / "a.txt")  # stays inside, but is no picture
    Image.new("RGB", (8, 8)).save(folder / "f.png")
    link(folder / "f.txt", outside / "secret.txt")
    for name in ("picture.png", "link/secret.png", "inner.png", "f.png"):
        assert opened.get("picture", name=name)[0] == 404, name
        assert opened.get("caption", name=name)[0] == 404, name
        assert opened.save(name, "overwritten", OUTSIDE)[0] == 404, name
        assert name not in opened.pictures()
    opened.replace("nobody", "everybody", preview=False)
    assert (outside / "secret.txt").read_text() == OUTSIDE


def test_a_symlink_that_goes_in_circles_is_refused(opened, folder):
    link(folder / "circle.png", folder / "circle.png")
    assert opened.get("picture", name="circle.png")[0] == opened.get("caption", name="circle.png")[0] == 404


def test_symlinks_that_stay_inside_are_read(opened, folder):
    link(folder / "again.png", folder / "2_more" / "d.png")
    assert opened.get("picture", name="again.png")[0] == 200


def test_oversized_bodies_are_refused_whether_they_announce_their_size_or_not(opened, folder):
    large = json.dumps({"name": "a.png", "caption": "x" * requests.LARGEST_BODY, "seen": ""}).encode()

    async def chunks():
        for start in range(0, len(large), 65536):
            yield large[start : start + 65536]

    headers = {"Content-Type": "application/json"}
    for data in (large, chunks()):
        status, answer = opened.ask("POST", f"{opened.token}/caption", data=data, headers=headers)
        assert status == 413 and "larger than" in answer["error"]
    status, answer = opened.save("a.png", "x" * (review.LONGEST_TEXT + 1), CAPTIONS["a"])
    assert status == 400 and "at most" in answer["error"]
    assert caption(folder, "a") == CAPTIONS["a"] + "\n"


@pytest.mark.parametrize("path", ["caption", "tokens", "replace", "undo"])
def test_what_a_form_can_send_and_what_is_no_object_is_refused(opened, path):
    assert opened.ask("POST", f"{opened.token}/{path}", data={"name": "a.png"})[0] == 415
    assert opened.ask("POST", f"{opened.token}/{path}", data=b"{}", headers={"Content-Type": "text/plain"})[0] == 415
    for data in (b"{", b"[]", b"\xff", b"[" * 100_000):
        json_ = {"Content-Type": "application/json"}
        assert opened.ask("POST", f"{opened.token}/{path}", data=data, headers=json_)[0] == 400


def test_values_of_the_wrong_kind_are_refused(opened):
    for body in ({}, {"name": 7}, {"name": "a.png", "caption": None, "seen": ""}, {"name": "a.png", "caption": "x"}):
        assert opened.post("caption", **body)[0] == 400
    assert opened.post("replace", find=["x"], replacement="y")[0] == 400
