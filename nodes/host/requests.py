"""What all of the pack's HTTP routes share: who may ask, and how a request is refused."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from json import JSONDecodeError, loads
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

LARGEST_BODY = 256 * 1024

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Refusal(Exception):
    """A request that is not answered: the HTTP status, and why in one sentence."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def answering(what: str, conflicts: tuple[type[Exception], ...] = ()) -> Callable[[Handler], Handler]:
    """Makes a handler answer this server's own pages and programs only, and every error as a sentence in JSON.

    `what` begins the sentence for other sites, as in "A training can be asked"; `conflicts` are answered with 409.
    """

    def guarded(handler: Handler) -> Handler:
        @wraps(handler)
        async def answer(request: web.Request) -> web.StreamResponse:
            try:
                refuse_other_sites(request, what)
                return await handler(request)
            except Refusal as refusal:
                return web.json_response({"error": str(refusal)}, status=refusal.status)
            except conflicts as reason:
                return web.json_response({"error": str(reason)}, status=409)

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
