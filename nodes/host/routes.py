"""The pack's HTTP routes."""

from __future__ import annotations

from aiohttp import web
from server import PromptServer

from . import review
from .progress import request_finish


def register() -> None:
    """Add the routes to the running server's.

    POST /lora_workbench/finish {"node_id": "7"}: the training on that node stops after its current step. Those below
    /lora_workbench/review are the caption review's.
    """
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        server.routes.post("/lora_workbench/finish")(_finish)
        review.register(server.routes)


async def _finish(request: web.Request) -> web.Response:
    body = await request.json()
    node_id = body.get("node_id") if isinstance(body, dict) else None
    if not isinstance(node_id, str) or not node_id or len(node_id) > 100:
        return web.json_response({"error": "node_id must be the id of the training node, as text."}, status=400)
    request_finish(node_id)
    return web.json_response({"finishing": node_id})
