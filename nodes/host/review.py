"""The HTTP routes of the caption review. They reach the pictures and captions of folders opened here, nothing else."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web

from ...training.listing import KOHYA, SUB_FOLDERS
from .folders import dataset_folder
from .requests import Refusal, answering, json_body, off_the_loop
from .review_session import CaptionChanged, NotInDataset, Session
from .tokens import counter

ADDRESS = "/lora_workbench/review"
LONGEST_TEXT = 20_000  # characters of a caption
MOST_FOLDERS = 32  # open at a time; the one opened longest ago is closed for another
SIDES = {"small": 320, "large": 1280}

_sessions: OrderedDict[str, Session] = OrderedDict()
# Two, so that decoding large pictures neither holds up ComfyUI's own pool nor fills the memory.
_workers = ThreadPoolExecutor(max_workers=2, thread_name_prefix="caption-review")
_off_the_loop = partial(off_the_loop, workers=_workers)


def register(routes: web.RouteTableDef) -> None:
    """Add the routes below ``/lora_workbench/review`` to the server's.

    `POST /open` answers a token that stands for the folder; all others are `/{token}/…` and stay inside that folder.
    """
    answers = answering("Captions can be reviewed", [(NotInDataset, 404), (OSError, 400), (ValueError, 400)])
    routes.post(f"{ADDRESS}/open")(answers(_open))
    routes.get(f"{ADDRESS}/{{token}}/pictures")(answers(_pictures))
    routes.get(f"{ADDRESS}/{{token}}/picture")(answers(_picture))
    routes.get(f"{ADDRESS}/{{token}}/caption")(answers(_read))
    routes.post(f"{ADDRESS}/{{token}}/caption")(answers(_save))
    routes.post(f"{ADDRESS}/{{token}}/tokens")(answers(_tokens))
    routes.post(f"{ADDRESS}/{{token}}/replace")(answers(_replace))
    routes.post(f"{ADDRESS}/{{token}}/undo")(answers(_undo))


def _text(values: Any, name: str) -> str:
    text = values.get(name)
    if not isinstance(text, str) or len(text) > LONGEST_TEXT or "\0" in text:
        raise Refusal(400, f"'{name}' must be a text of at most {LONGEST_TEXT} characters.")
    return text


def _session(request: web.Request) -> Session:
    session = _sessions.get(request.match_info["token"])
    if session is None:
        raise Refusal(410, "This folder is not open for review: open it from the node again.")
    return session


async def _open(request: web.Request) -> web.Response:
    body = await json_body(request)
    typed = _text(body, "folder")
    if not typed.strip():
        raise Refusal(400, "No folder is given: type one into LoRA Dataset Loader.")
    body = {"trigger_word": "", "sub_folders": KOHYA, **body}
    trigger_word, sub_folders = _text(body, "trigger_word"), _text(body, "sub_folders")
    if sub_folders not in SUB_FOLDERS:
        raise Refusal(400, f"'sub_folders' must be one of: {', '.join(SUB_FOLDERS)}.")
    session = await _off_the_loop(_opened, dataset_folder(typed), trigger_word, sub_folders)
    token = secrets.token_urlsafe(24)
    _sessions[token] = session
    while len(_sessions) > MOST_FOLDERS:
        _sessions.popitem(last=False)
    return web.json_response({"token": token, "folder": str(session.folder)})


def _opened(folder: Path, trigger_word: str, sub_folders: str) -> Session:
    """The review of a folder; the first one loads the tokenizer, which takes a moment."""
    return Session(folder, trigger_word, sub_folders, counter())


async def _pictures(request: web.Request) -> web.Response:
    return web.json_response(await _off_the_loop(_session(request).listing))


async def _picture(request: web.Request) -> web.Response:
    session, side = _session(request), SIDES.get(request.query.get("size", "small"))
    if side is None:
        raise Refusal(400, f"'size' must be one of: {', '.join(SIDES)}.")
    # A changed picture has another address, see `version`, so the browser may keep what it has.
    headers = {"Cache-Control": "private, max-age=86400, immutable", "X-Content-Type-Options": "nosniff"}
    picture = await _off_the_loop(session.thumbnail, _text(request.query, "name"), side)
    return web.Response(body=picture, content_type="image/jpeg", headers=headers)


async def _read(request: web.Request) -> web.Response:
    return web.json_response(await _off_the_loop(_session(request).read, _text(request.query, "name")))


async def _save(request: web.Request) -> web.Response:
    session, body = _session(request), await json_body(request)
    values = (_text(body, "name"), _text(body, "caption"), _text(body, "seen"), body.get("reviewed") is True)
    try:
        return web.json_response(await _off_the_loop(session.save, *values))
    except CaptionChanged as conflict:
        return web.json_response({"error": str(conflict), "picture": conflict.picture}, status=409)


async def _tokens(request: web.Request) -> web.Response:
    session, body = _session(request), await json_body(request)
    tokens = await _off_the_loop(session.tokens, _text(body, "name"), _text(body, "caption"))
    return web.json_response({"tokens": tokens})


async def _replace(request: web.Request) -> web.Response:
    session, body = _session(request), await json_body(request)
    texts = (_text(body, "find"), _text(body, "replacement"))
    how = {name: body.get(name) is True for name in ("whole_words", "match_case")}
    work = partial(session.replace, *texts, preview=body.get("preview") is not False, **how)
    return web.json_response(await _off_the_loop(work))


async def _undo(request: web.Request) -> web.Response:
    session = _session(request)
    await json_body(request)
    return web.json_response(await _off_the_loop(session.undo))
