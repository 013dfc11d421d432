"""A real ComfyUI server in a folder of its own, driven through its HTTP API and websocket."""

import asyncio
import contextlib
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ENDINGS = {"execution_success": "success", "execution_error": "error", "execution_interrupted": "interrupted"}
PREVIEW, TEXT, PREVIEW_WITH_METADATA = 1, 3, 4  # kinds of binary message, as in ComfyUI's protocol.py


class GraphRefused(ValueError):
    """ComfyUI would not queue a graph; the message says which input of which node is wrong."""


@dataclass
class Run:
    """What happened to one queued graph."""

    prompt_id: str
    status: str = "running"  # then success, error or interrupted
    events: list[tuple[str, dict]] = field(default_factory=list)
    outputs: dict[str, dict] = field(default_factory=dict)  # node id -> what the node shows
    previews: list[bytes] = field(default_factory=list)  # JPEG or PNG files, in order
    texts: list[str] = field(default_factory=list)  # progress texts, in order
    error: str = ""
    seconds: float = 0.0

    def executed(self) -> list[str]:
        """Ids of the nodes that were really run, in order; those answered from the cache are not among them."""
        return [data["node"] for name, data in self.events if name == "executing" and data.get("node")]


@contextlib.contextmanager
def running(
    comfyui: Path,
    folder: Path,
    packs: Mapping[str, Path],
    *,
    gpu: bool = False,
    python: str = sys.executable,
    options: tuple[str, ...] = (),
    timeout: float = 300,
) -> Iterator["Server"]:
    """A server whose models, input, output and custom nodes all lie in ``folder``; stopped on leaving.

    ``packs`` maps folder names in ``custom_nodes`` to node packs. Raises RuntimeError when ComfyUI does not start or
    cannot import one of them.
    """
    for name in ("models/loras", "input", "output", "custom_nodes"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for name, pack in packs.items():
        install(pack, folder / "custom_nodes" / name)
    port = free_port()
    command = [python, str(comfyui / "main.py"), "--listen", "127.0.0.1", "--port", str(port)]
    command += ["--base-directory", str(folder), "--database-url", "sqlite:///:memory:"]
    command += ["--disable-api-nodes", "--disable-auto-launch", *([] if gpu else ["--cpu"]), *options]
    environment = {"PYTHONPYCACHEPREFIX": str(folder / "pycache"), **os.environ, "PYTHONUNBUFFERED": "1"}
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=environment)
    server = Server(f"http://127.0.0.1:{port}", folder, process)
    try:
        server.wait_until_ready(timeout)
        yield server
    finally:
        server.stop()


def install(pack: Path, place: Path) -> None:
    """Makes ``pack`` visible at ``place``, by a link where the system allows one and by a copy otherwise."""
    if place.is_symlink() or place.exists():
        return
    try:
        place.symlink_to(pack, target_is_directory=True)
    except OSError:
        shutil.copytree(pack, place, ignore=shutil.ignore_patterns(".git", "__pycache__", "demo_output"))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A running ComfyUI: queue graphs, watch them, fetch what they made."""

    def __init__(self, url: str, folder: Path, process: subprocess.Popen):
        self.url = url
        self.folder = folder
        self.process = process
        self.client_id = uuid.uuid4().hex

    def log(self) -> str:
        """Everything the server has printed so far."""
        return (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")

    def wait_until_ready(self, timeout: float) -> None:
        """Returns when the server answers and every pack was imported; raises RuntimeError with the log otherwise."""
        deadline = time.monotonic() + timeout
        while True:
            if self.process.poll() is not None:
                raise RuntimeError(f"ComfyUI stopped while starting. The end of its log:\n{tail(self.log())}")
            try:
                self.get("/system_stats")
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                if time.monotonic() > deadline:
                    raise RuntimeError(
                        f"ComfyUI did not answer within {timeout:.0f} s. The end of its log:\n{tail(self.log())}"
                    ) from None
            time.sleep(0.2)
        if "IMPORT FAILED" in self.log():
            raise RuntimeError(f"ComfyUI could not import a node pack. Its log:\n{tail(self.log(), 80)}")

    def stop(self) -> None:
        """Ends the server; harmless when it has ended."""
        self.process.terminate()
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return response.read()

    def post(self, path: str, body: dict) -> bytes:
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.read()

    def object_info(self) -> dict:
        """Every node's inputs and outputs, as the frontend sees them."""
        return json.loads(self.get("/object_info"))

    def interrupt(self) -> None:
        """Presses Cancel."""
        self.post("/interrupt", {})

    def become_idle(self, timeout: float = 60) -> None:
        """Cancels whatever runs or waits, and returns when nothing does; TimeoutError when it does not end."""
        deadline = time.monotonic() + timeout
        while json.loads(self.get("/prompt"))["exec_info"]["queue_remaining"]:
            if time.monotonic() > deadline:
                raise TimeoutError(f"ComfyUI is still busy {timeout:.0f} s after being asked to stop.")
            self.post("/queue", {"clear": True})
            self.interrupt()
            time.sleep(0.2)

    def image(self, shown: Mapping[str, str]) -> bytes:
        """The file behind one entry of a node's ``images``, fetched as the frontend does."""
        names = {key: shown[key] for key in ("filename", "subfolder", "type") if key in shown}
        return self.get("/view?" + urllib.parse.urlencode(names))

    def images(self, run: Run, node: str) -> list[bytes]:
        """All image files that ``node`` showed in ``run``."""
        return [self.image(shown) for shown in run.outputs.get(node, {}).get("images", ())]

    def submit(
        self,
        prompt: dict,
        on_event: Callable[[str, dict], None] = lambda name, data: None,
        *,
        workflow: dict | None = None,
        timeout: float = 600,
    ) -> Run:
        """Queues an API-form graph and watches it to its end; raises GraphRefused when ComfyUI does not take it."""
        started = time.monotonic()
        # In a thread of its own, because the caller's may have an event loop already, for example playwright's.
        with ThreadPoolExecutor(1) as thread:
            watching = asyncio.wait_for(self._watch(prompt, on_event, workflow), timeout)
            run = thread.submit(asyncio.run, watching).result()
        run.seconds = time.monotonic() - started
        return run

    async def _watch(self, prompt: dict, on_event: Callable[[str, dict], None], workflow: dict | None) -> Run:
        import aiohttp

        address = f"{self.url}/ws?clientId={self.client_id}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket_:
            await socket_.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
            run = Run(await asyncio.to_thread(self._queue, prompt, workflow))
            async for message in socket_:
                if message.type == aiohttp.WSMsgType.BINARY:
                    record_binary(run, message.data)
                    if kind_of(message.data) == TEXT:
                        await asyncio.to_thread(on_event, "progress_text", {"text": run.texts[-1]})
                elif message.type == aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                    name, data = event["type"], event.get("data") or {}
                    if data.get("prompt_id", run.prompt_id) != run.prompt_id:
                        continue
                    record(run, name, data)
                    await asyncio.to_thread(on_event, name, data)
                if run.status != "running":
                    return run
        raise RuntimeError(f"ComfyUI closed the connection while a graph was running:\n{tail(self.log())}")

    def _queue(self, prompt: dict, workflow: dict | None) -> str:
        extra = {"extra_data": {"extra_pnginfo": {"workflow": workflow}}} if workflow else {}
        try:
            answer = self.post("/prompt", {"prompt": prompt, "client_id": self.client_id, **extra})
        except urllib.error.HTTPError as error:
            raise GraphRefused(refusal(error.read())) from None
        return json.loads(answer)["prompt_id"]


def record(run: Run, name: str, data: dict) -> None:
    """Adds one JSON message to ``run``."""
    run.events.append((name, data))
    if name == "executed":
        run.outputs[data["node"]] = data.get("output") or {}
    if name == "execution_error":
        where = f"{data['node_type']} ({data['node_id']})"
        run.error = f"{where}: {data['exception_type']}: {data['exception_message']}".strip()
    run.status = ENDINGS.get(name, run.status)


def record_binary(run: Run, message: bytes) -> None:
    """Adds one binary message, a preview image or a progress text, to ``run``."""
    kind = kind_of(message)
    if kind == PREVIEW:
        run.previews.append(message[8:])
    elif kind in (TEXT, PREVIEW_WITH_METADATA):
        (length,) = struct.unpack(">I", message[4:8])
        rest = message[8 + length :]
        if kind == TEXT:
            run.texts.append(rest.decode("utf-8", "replace"))
        else:
            run.previews.append(rest)


def kind_of(message: bytes) -> int:
    return struct.unpack(">I", message[:4])[0]


def refusal(body: bytes) -> str:
    """The reasons in ComfyUI's answer to a graph it does not take, one line each."""
    try:
        answer = json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace")
    lines = [answer["error"]["message"] if isinstance(answer.get("error"), dict) else str(answer.get("error"))]
    for node, problem in (answer.get("node_errors") or {}).items():
        lines += [f"{problem['class_type']} ({node}): {e['message']}: {e['details']}" for e in problem["errors"]]
    return "\n".join(lines)


def tail(text: str, lines: int = 40) -> str:
    return "\n".join(text.splitlines()[-lines:])
