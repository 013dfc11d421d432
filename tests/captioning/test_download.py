"""Fetching a caption model, with the real huggingface_hub against a stand-in for huggingface.co on this machine."""

import hashlib
import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest

from lora_workbench.captioning import download
from lora_workbench.captioning.download import DOWNLOADS, Download, fetch

pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
TAGGER = Download("someone/tiny-tagger", "apache-2.0", 1000)
FILES = {
    "config.json": b'{"architecture": "tiny"}',
    "selected_tags.csv": b"tag_id,name,category,count\n",
    "model.safetensors": b"weights" * 20,
    "pytorch_model.bin": b"pickled",
    "model.onnx": b"onnx" * 50,
    "modeling_own.py": b"raise SystemExit",
    "README.md": b"hello",
}


class Hub:
    """What the stand-in holds, and every path that was asked for."""

    def __init__(self, address: str):
        self.address, self.files, self.licence, self.asked = address, dict(FILES), "apache-2.0", []

    def answer(self, path: str) -> tuple[int, dict, bytes]:
        if path == f"/api/models/{TAGGER.repository}":
            siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files.items()]
            page = {"id": TAGGER.repository, "sha": COMMIT, "siblings": siblings, "cardData": {"license": self.licence}}
            return 200, {"Content-Type": "application/json"}, json.dumps({**page, "private": False}).encode()
        name = path.removeprefix(f"/{TAGGER.repository}/resolve/{COMMIT}/")
        if name not in self.files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        data = self.files[name]
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}, data


@contextmanager
def serving():
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            path = urlsplit(self.path).path
            hub.asked.append((self.command, path, self.headers.get("Authorization")))
            status, headers, data = hub.answer(path)
            self.send_response(status)
            for header, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(header, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub = Hub(f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub():
    with serving() as hub:
        yield hub


def fetched(hub) -> set[str]:
    return {path.rpartition("/")[2] for command, path, _ in hub.asked if command == "GET" and "/resolve/" in path}


def test_licence_and_size_are_said_before():
    for offered in DOWNLOADS:
        assert offered.licence in offered.label and f"{offered.size / 1e9:.1f} GB" in offered.label
        assert offered.repository in offered.label


def test_only_weights_that_hold_no_code_are_fetched_and_whole(hub, tmp_path):
    folder = fetch(TAGGER, tmp_path / "LLM", endpoint=hub.address)
    assert folder == tmp_path / "LLM" / "tiny-tagger"
    there = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    assert there == {name: FILES[name] for name in ("config.json", "selected_tags.csv", "model.safetensors")}
    assert fetched(hub) == set(there)


def test_nothing_is_fetched_twice(hub, tmp_path):
    fetch(TAGGER, tmp_path, endpoint=hub.address)
    hub.asked.clear()
    fetch(TAGGER, tmp_path, endpoint=hub.address)
    assert fetched(hub) == set()


def test_the_users_own_token_is_not_sent(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fetch(TAGGER, tmp_path, endpoint=hub.address)
    assert {authorization for *_, authorization in hub.asked} == {None}


def test_another_licence_than_was_said_is_refused_before_anything_is_fetched(hub, tmp_path):
    hub.licence = "cc-by-nc-4.0"
    with pytest.raises(ValueError, match="licence of someone/tiny-tagger is 'cc-by-nc-4.0' now, not 'apache-2.0'"):
        fetch(TAGGER, tmp_path, endpoint=hub.address)
    assert fetched(hub) == set() and list(tmp_path.iterdir()) == []


def test_more_than_was_said_is_refused_before_anything_is_fetched(hub, tmp_path):
    hub.files["more.safetensors"] = b"x" * 2000
    with pytest.raises(ValueError, match="has grown"):
        fetch(TAGGER, tmp_path, endpoint=hub.address)
    assert fetched(hub) == set()


def test_a_full_disk_is_noticed_before_anything_is_fetched(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "SPARE", 2**80)
    with pytest.raises(ValueError, match="free on the disk"):
        fetch(TAGGER, tmp_path, endpoint=hub.address)
    assert fetched(hub) == set()


def test_cancelling_ends_it_between_two_files_and_the_rest_is_fetched_later(hub, tmp_path):
    class Cancelled(BaseException):
        pass

    calls = []

    def checkpoint():
        calls.append(None)
        if len(calls) == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        fetch(TAGGER, tmp_path, checkpoint, endpoint=hub.address)
    assert len(fetched(hub)) == 1
    fetch(TAGGER, tmp_path, endpoint=hub.address)
    assert len(fetched(hub)) == 3


def test_a_hub_that_cannot_be_reached_is_one_sentence_that_says_where_the_files_belong(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(OSError, match=r"tiny-tagger could not be fetched \(.+\): try again, or put its files into"):
        fetch(TAGGER, tmp_path, endpoint=address)
