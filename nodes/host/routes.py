"""The pack's HTTP routes."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web
from server import PromptServer

from . import controls, folders, live, lora_routes, picker_routes, reproduction, review
from .requests import LONGEST_ID, LONGEST_NAME, Refusal, answering, off_the_loop

FINISH = "/lora_workbench/finish"
TRAINING = "/lora_workbench/training/{node_id}"


def register() -> None:
    """Add the routes to the running server's, those of the caption review, the Picker and the LoRAs among them.

    RuntimeError when another copy of the pack has done so: it would get the requests that are meant for this one.
    """
    server = getattr(PromptServer, "instance", None)
    if server is not None:
        if any(getattr(route, "path", None) == FINISH for route in server.routes):
            raise RuntimeError(
                f"LoRA Workbench is installed twice, so the copy in '{Path(__file__).parents[2]}' is left out: delete "
                "one of the two folders in custom_nodes, then restart ComfyUI."
            )
        add_training(server.routes)
        review.register(server.routes)
        picker_routes.register(server.routes)
        lora_routes.register(server.routes)


def add_training(routes: web.RouteTableDef) -> None:
    """Add the routes of the training on a node.

    GET /lora_workbench/training/7?name=my_lora answers the live state of node 7, or of its last run of that name.
    POST /lora_workbench/training/7/finish, also save, preview, pause and resume, asks that training to do so, and
    answers 409 when it cannot. POST /lora_workbench/finish {"node_id": "7"} is another way to ask for the first.
    GET /lora_workbench/workflow?lora=my_lora/my_lora_000100.safetensors&name=again answers the graph that trains that
    file again, in API form, under the name `again`.
    """
    answers = answering("A training can be asked")
    routes.post(FINISH)(answers(_finish))
    routes.get(TRAINING)(answers(_state))
    routes.post(f"{TRAINING}/{{action}}")(answers(_ask))
    routes.get("/lora_workbench/workflow")(answers(_workflow))


def _node_id(value: object) -> str:
    if not isinstance(value, str) or not value or len(value) > LONGEST_ID:
        raise Refusal(400, "node_id must be the id of the training node, as text.")
    return value


async def _finish(request: web.Request) -> web.Response:
    try:
        body = await request.json()
    except ValueError:
        body = None
    node_id = _node_id(body.get("node_id") if isinstance(body, dict) else None)
    _asked(node_id, "finish")
    return web.json_response({"finishing": node_id})


async def _state(request: web.Request) -> web.Response:
    node_id, name = _node_id(request.match_info["node_id"]), request.query.get("name")
    if name is not None and len(name) > LONGEST_NAME:
        raise Refusal(400, f"name must be the name of a LoRA, of at most {LONGEST_NAME} characters.")
    # An earlier run is read from its folder, which may take a while.
    return web.json_response(await off_the_loop(live.state_of, node_id, name))


async def _ask(request: web.Request) -> web.Response:
    node_id, action = _node_id(request.match_info["node_id"]), request.match_info["action"]
    if action not in controls.ACTIONS:
        raise Refusal(404, f"'{action[:50]}' is nothing a training can be asked: use {', '.join(controls.ACTIONS)}.")
    _asked(node_id, action)
    return web.json_response({"node_id": node_id, "asked": action})


def _asked(node_id: str, action: str) -> None:
    try:
        controls.ask(node_id, action)
    except controls.NotPossible as reason:
        raise Refusal(409, str(reason)) from None


async def _workflow(request: web.Request) -> web.Response:
    lora, name = request.query.get("lora", ""), request.query.get("name")
    try:
        path = folders.lora_path(lora)
        graph = await off_the_loop(reproduction.workflow_of, path, name)
    except ValueError as reason:
        raise Refusal(404, str(reason)) from None
    return web.json_response(graph)
