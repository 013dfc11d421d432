"""Workflows as the frontend saves them, turned into what the HTTP API takes, and prepared for the toy models."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NOTES = {"Note", "MarkdownNote"}
MUTED, BYPASSED = 2, 4
# What each loader gives, as output numbers of a node that gives MODEL, CLIP, VAE.
LOADERS = {"CheckpointLoaderSimple": (0, 1, 2), "UNETLoader": (0,), "DualCLIPLoader": (1,), "VAELoader": (2,)}


def to_api(workflow: Mapping, object_info: Mapping) -> dict[str, dict]:
    """The graph of a saved workflow in the form that POST /prompt takes: the work of the frontend's graphToPrompt.

    Notes and muted nodes are left out. Raises ValueError naming the node for anything it cannot translate faithfully.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOTES or node.get("mode", 0) == MUTED:
            continue
        name = f"{node['type']} ({node['id']})"
        if node.get("mode", 0) == BYPASSED:
            raise ValueError(f"{name} is bypassed, which this converter does not support: unbypass or delete it.")
        if node["type"] not in object_info:
            raise ValueError(f"{name} is not a node this ComfyUI knows: is its pack installed?")
        inputs = widget_inputs(node, object_info[node["type"]], name)
        for socket in node.get("inputs", ()):
            if socket.get("link") is not None:
                inputs[socket["name"]] = sources[socket["link"]]
        prompt[str(node["id"])] = {
            "class_type": node["type"],
            "inputs": inputs,
            "_meta": {"title": node.get("title") or object_info[node["type"]].get("display_name") or node["type"]},
        }
    return prompt


def widget_inputs(node: Mapping, schema: Mapping, name: str) -> dict[str, Any]:
    """The values of a node's widgets by input name; the frontend saves them by position."""
    places = list(widgets(schema))
    values = node.get("widgets_values") or []
    if len(values) != len(places):
        wanted = ", ".join(place or "(after generate)" for place in places)
        raise ValueError(f"{name} has {len(values)} widget values but its schema has {len(places)} widgets: {wanted}.")
    return {place: value for place, value in zip(places, values, strict=True) if place}


def widgets(schema: Mapping) -> Iterator[str]:
    """Names of a node's widgets in the frontend's order; "" for the "control after generate" box beside a seed."""
    for name, (kind, options) in inputs(schema):
        if options.get("forceInput") or not (isinstance(kind, list) or kind in WIDGETS):
            continue
        yield name
        if options.get("control_after_generate"):
            yield ""


def inputs(schema: Mapping) -> Iterator[tuple[str, tuple[Any, Mapping]]]:
    """Every input of a node as (name, (type, options)), in order."""
    for group in ("required", "optional"):
        for name, spec in schema["input"].get(group, {}).items():
            yield name, (spec[0], spec[1] if len(spec) > 1 else {})


def with_loader(prompt: Mapping[str, dict], class_type: str) -> dict[str, dict]:
    """The same graph with its loaders replaced by one node that gives MODEL, CLIP and VAE."""
    result = copy.deepcopy(dict(prompt))
    loaders = {node: LOADERS[part["class_type"]] for node, part in prompt.items() if part["class_type"] in LOADERS}
    for node in loaders:
        del result[node]
    result["loader"] = {"class_type": class_type, "inputs": {}, "_meta": {"title": class_type}}
    for part in result.values():
        for name, value in part["inputs"].items():
            if is_link(value) and value[0] in loaders:
                part["inputs"][name] = ["loader", loaders[value[0]][value[1]]]
    return result


def with_inputs(prompt: Mapping[str, dict], class_type: str, **values: Any) -> dict[str, dict]:
    """The same graph with ``values`` set on every node of one class; raises KeyError when there is no such input."""
    result = copy.deepcopy(dict(prompt))
    for node in find(result, class_type):
        for name, value in values.items():
            if name not in result[node]["inputs"]:
                raise KeyError(f"{class_type} has no input {name}; it has {', '.join(result[node]['inputs'])}.")
            result[node]["inputs"][name] = value
    return result


def find(prompt: Mapping[str, dict], class_type: str) -> list[str]:
    """Ids of all nodes of one class; raises KeyError when there is none."""
    found = [node for node, part in prompt.items() if part["class_type"] == class_type]
    if not found:
        raise KeyError(f"The graph has no {class_type}.")
    return found


def shown_by(prompt: Mapping[str, dict], title: str) -> str:
    """Id of the node with this title; raises KeyError when there is none."""
    found = [node for node, part in prompt.items() if part.get("_meta", {}).get("title") == title]
    if not found:
        raise KeyError(f"The graph has no node titled {title!r}.")
    return found[0]


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)
