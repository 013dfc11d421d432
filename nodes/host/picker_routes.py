"""The HTTP routes of the Picker on a node: its state, the user's choice, keeping and deleting files."""

from __future__ import annotations

import threading
from typing import Any

from aiohttp import web

from .. import keeping
from . import choice
from .choice import Choice, NotPossible
from .requests import LONGEST_ID, LONGEST_NAME, Refusal, answering, json_body, off_the_loop

ADDRESS = "/lora_workbench/picker/{node_id}"
MOST_FILES = 10_000

_files = threading.Lock()
"""One change of files at a time, so that none is deleted while it is being kept."""


def register(routes: web.RouteTableDef) -> None:
    """Add the routes below ``/lora_workbench/picker`` to the server's.

    GET /lora_workbench/picker/7 answers the state of the Picker on node 7. POST there to /choose {"lora": name} answers
    its question, /keep {"lora": name} copies a file into the loras folder, /delete {"loras": [names], "bytes": total}
    deletes files of exactly that size together, /again has the node run once more; 409 says why not. With the
    state's "id" that picking alone is meant: another workflow may have a Picker on a node of the same number.
    """
    answers = answering("A Picker can be asked", [(OSError, 409), (ValueError, 409)])
    routes.get(ADDRESS)(answers(_state))
    for action, handler in {"choose": _choose, "keep": _keep, "delete": _delete, "again": _ask_again}.items():
        routes.post(f"{ADDRESS}/{action}")(answers(handler))


def _node_id(request: web.Request) -> str:
    node_id = request.match_info["node_id"]
    if len(node_id) > LONGEST_ID:
        raise Refusal(400, "node_id must be the id of the Picker's node.")
    return node_id


def _choice(request: web.Request) -> Choice:
    node_id = _node_id(request)
    found = choice.of(node_id)
    if found is None:
        raise NotPossible(f"Node {node_id} has not picked since ComfyUI started: queue it first.")
    return found


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= LONGEST_NAME and "\0" not in value


async def _asked(request: web.Request) -> tuple[Choice, dict]:
    """The Picker that is meant, and what is asked of it."""
    found, body = _choice(request), await json_body(request)
    if body.get("id", found.id) != found.id:
        raise NotPossible(f"Node {found.node_id} has begun another picking since: look at its list again.")
    return found, body


def _lora(body: dict) -> str:
    lora = body.get("lora")
    if not _is_name(lora):
        raise Refusal(400, "'lora' must be the name of a LoRA file, as text.")
    return lora


async def _state(request: web.Request) -> web.Response:
    return web.json_response(await off_the_loop(choice.state_of, _node_id(request)))


async def _choose(request: web.Request) -> web.Response:
    chosen, body = await _asked(request)
    lora = _lora(body)
    await off_the_loop(chosen.choose, lora)
    return web.json_response({"node_id": chosen.node_id, "chosen": lora})


async def _keep(request: web.Request) -> web.Response:
    chosen, body = await _asked(request)
    return web.json_response({"kept": await off_the_loop(_kept, chosen, _lora(body))})


def _kept(chosen: Choice, lora: str) -> str:
    with _files:
        path = keeping.keep(*_named(chosen, lora))
        chosen.changed()
    return path.name


def _named(chosen: Choice, lora: str) -> tuple:
    checkpoint, picture = chosen.to_keep(lora)
    return checkpoint, chosen.name, picture


async def _delete(request: web.Request) -> web.Response:
    chosen, body = await _asked(request)
    names, total = body.get("loras"), body.get("bytes")
    if not isinstance(names, list) or not 0 < len(names) <= MOST_FILES or not all(map(_is_name, names)):
        raise Refusal(400, "'loras' must be a list of names of LoRA files.")
    if len(set(names)) < len(names):
        raise Refusal(400, "'loras' names a file twice.")
    if type(total) is not int:
        raise Refusal(400, "'bytes' must be the size of all these files together, as a whole number.")
    await off_the_loop(_deleted, chosen, names, total)
    return web.json_response({"deleted": names, "bytes": total})


def _deleted(chosen: Choice, names: list[str], total: int) -> None:
    with _files:
        try:
            chosen.check_deletable(names)
            keeping.delete(names, total)
        finally:
            chosen.changed()


async def _ask_again(request: web.Request) -> web.Response:
    node_id = _node_id(request)
    choice.ask_again(node_id)
    return web.json_response({"node_id": node_id, "asked": "again"})
