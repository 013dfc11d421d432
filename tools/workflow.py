"""Workflows as the frontend saves them, turned into what the HTTP API takes, and prepared for the toy models."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
SEEDS = {"seed", "noise_seed"}  # the frontend gives these a "control after generate" box unless the schema says no
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
        if options.get("control_after_generate", name in SEEDS):
            yield ""


def inputs(schema: Mapping) -> Iterator[tuple[str, tuple[Any, Mapping]]]:
    """Every input of a node as (name, (type, options)), in order."""
    for group in ("required", "optional"):
        for name, spec in schema["input"].get(group, {}).items():
            yield name, (spec[0], spec[1] if len(spec) > 1 else {})


def defaults(schema: Mapping) -> dict[str, Any]:
    """Every widget of a node at its default."""
    values = {}
    for name, (kind, options) in inputs(schema):
        if isinstance(kind, list) or kind in WIDGETS:
            choices = kind if isinstance(kind, list) else options.get("options", ())
            values[name] = options.get("default", choices[0] if choices else "")
    return values


def with_loader(workflow: Mapping, class_type: str) -> dict:
    """The same workflow with its loaders replaced by one node that gives MODEL, CLIP and VAE."""
    result = copy.deepcopy(dict(workflow))
    loaders = [node for node in result["nodes"] if node["type"] in LOADERS]
    if not loaders:
        raise KeyError(f"The workflow has none of the loaders {', '.join(LOADERS)}.")
    slots = {node["id"]: LOADERS[node["type"]] for node in loaders}
    first = loaders[0]["id"]
    outputs = [{"name": kind, "type": kind, "links": []} for kind in ("MODEL", "CLIP", "VAE")]
    for link in result["links"]:
        if link[1] in slots:
            link[1:3] = first, slots[link[1]][link[2]]
            outputs[link[2]]["links"].append(link[0])
    loaders[0].update(type=class_type, inputs=[], outputs=outputs, widgets_values=[])
    loaders[0]["properties"] = {"Node name for S&R": class_type}
    result["nodes"] = [node for node in result["nodes"] if node["id"] == first or node["id"] not in slots]
    return result


def with_values(workflow: Mapping, object_info: Mapping, class_type: str, **values: Any) -> dict:
    """The same workflow with ``values`` set on every node of one class; KeyError when there is no such widget."""
    result = copy.deepcopy(dict(workflow))
    found = [node for node in result["nodes"] if node["type"] == class_type]
    if not found:
        raise KeyError(f"The workflow has no {class_type}.")
    places = list(widgets(object_info[class_type]))
    for node in found:
        for name, value in values.items():
            if name not in places:
                raise KeyError(f"{class_type} has no widget {name}; it has {', '.join(filter(None, places))}.")
            node["widgets_values"][places.index(name)] = value
    return result


def titled(workflow: Mapping, title: str) -> str:
    """Id of the node with this title, as the API writes it; raises KeyError when there is none."""
    for node in workflow["nodes"]:
        if node.get("title") == title:
            return str(node["id"])
    raise KeyError(f"The workflow has no node titled {title!r}.")
