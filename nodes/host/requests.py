"""What all of the pack's HTTP routes share: who may ask, and how a request is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from functools import wraps
from json import JSONDecodeError, loads
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

LARGEST_BODY = 256 * 1024
LONGEST_ID, LONGEST_NAME = 100, 1000
"""Characters of a node's id and of a LoRA's name."""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Refusal(Exception):
    """A request that is not answered: the HTTP status, and why in one sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def answering(what: str, statuses: Sequence[tuple[type[Exception], int]] = ()) -> Callable[[Handler], Handler]:
    """Makes a handler answer this server's own pages and programs only, and every error as a sentence in JSON.

    `what` begins the sentence for other sites, as in "A training can be asked"; `statuses` say with which status
    errors of a kind are answered, the first that fits.
    """

    def guarded(handler: Handler) -> Handler:
        @wraps(handler)
        async def answer(request: web.Request) -> web.StreamResponse:
            try:
                refuse_other_sites(request, what)
                return await handler(request)
            except Refusal as refusal:
                return web.json_response({"error": str(refusal)}, status=refusal.status)
            except tuple(kind for kind, _ in statuses) as reason:
                status = next(status for kind, status in statuses if isinstance(reason, kind))
                return web.json_response({"error": str(reason)}, status=status)

        return answer

    return guarded


def refuse_other_sites(request: web.Request, what: str) -> None:
    """Refuse what a page of another site, port or sandbox asks for. A program that sends neither header may ask."""
    site, origin = request.headers.get("Sec-Fetch-Site"), request.headers.get("Origin")
    if site not in (None, "same-origin", "none") or (origin is not None and not _is_own(origin, request.host)):
        raise Refusal(403, f"{what} from ComfyUI's own page only.")


def _is_own(origin: str, host: str) -> bool:
    """Whether an Origin header names the host and port that the request went to."""
    try:
        asked, own = urlsplit(origin), urlsplit(f"//{host}")
        usual = {"http": 80, "https": 443}.get(asked.scheme)
        return bool(asked.hostname) and (asked.hostname, asked.port or usual) == (own.hostname, own.port or usual)
    except ValueError:
        return False


async def off_the_loop(work: Callable, *values: Any, workers: Executor | None = None) -> Any:
    """What some work gives, done in another thread, so that the server answers others meanwhile."""
    return await asyncio.get_running_loop().run_in_executor(workers, work, *values)


async def json_body(request: web.Request) -> dict[str, Any]:
    """The JSON object in a request, read no further than LARGEST_BODY."""
    if request.content_type != "application/json":
        raise Refusal(415, "The request must be JSON.")
    if (request.content_length or 0) > LARGEST_BODY:
        raise Refusal(413, f"The request is larger than {LARGEST_BODY // 1024} KB.")
    data = bytearray()
    async for chunk in request.content.iter_any():
        data += chunk
        if len(data) > LARGEST_BODY:
            raise Refusal(413, f"The request is larger than {LARGEST_BODY // 1024} KB.")
    try:
        body = loads(data)
    except (JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise Refusal(400, "The request is not JSON.") from None
    if not isinstance(body, dict):
        raise Refusal(400, "The request must be a JSON object.")
    return body
