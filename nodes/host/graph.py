"""The graph a node was queued in, for the files it makes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from comfy.cli_args import args
from PIL.PngImagePlugin import PngInfo

SECRET_NAMES = re.compile(
    r"(?i)(^|_)(api_?(key|token)|access_?(key|token)|auth(_?token)?|hf_?token|passwo?r?d|secret)(_|$)"
)
SECRET_NAMES_ALONE = ("key", "token")
SECRET_VALUES = re.compile(
    r"\b(sk-[\w-]{16,}|hf_\w{20,}|gh[pousr]_\w{20,}|AIza[\w-]{30,})|(?<=://)[^/@\s:]+:[^/@\s]+(?=@)"
)


@dataclass(frozen=True)
class Graph:
    """A queued graph in API form, what the frontend sent along with it, and which node of it is meant."""

    prompt: Mapping[str, Mapping] = field(default_factory=dict)
    extra: Mapping[str, object] = field(default_factory=dict)
    node: str = ""

    @classmethod
    def of(cls, hidden) -> Graph:
        """The graph behind a node's hidden inputs; an empty one where the user told ComfyUI to write no metadata."""
        if hidden is None or args.disable_metadata:
            return cls()
        # ComfyUI notes in it what made a node run again, which is nothing of the graph.
        prompt = {
            node: {key: value for key, value in facts.items() if key != "is_changed"}
            for node, facts in (hidden.prompt or {}).items()
        }
        return cls(prompt, hidden.extra_pnginfo or {}, str(hidden.unique_id or ""))

    def png_info(self) -> PngInfo | None:
        """What ComfyUI's Save Image writes into a picture, so that dropping it on the canvas restores the graph."""
        if not self.prompt and not self.extra:
            return None
        info = PngInfo()
        if self.prompt:
            info.add_text("prompt", json.dumps(self.prompt))
        for name, value in self.extra.items():
            info.add_text(name, json.dumps(value))
        return info

    def needed(self) -> dict[str, dict]:
        """The part of the graph that the node depends on, without passwords and keys: what a LoRA file may carry."""
        found, ahead = {}, [self.node]
        while ahead:
            node = ahead.pop()
            if node in found or node not in self.prompt:
                continue
            inputs = self.prompt[node].get("inputs", {})
            found[node] = {
                "class_type": self.prompt[node]["class_type"],
                "inputs": {name: without_secrets(name, value) for name, value in inputs.items()},
            }
            ahead += [str(value[0]) for value in inputs.values() if is_link(value)]
        return {node: found[node] for node in sorted(found)}


def is_link(value: object) -> bool:
    """Whether an input's value is [node id, output number]."""
    return isinstance(value, (list, tuple)) and len(value) == 2 and isinstance(value[1], int) and str(value[0]) != ""


def without_secrets(name: str, value: object) -> object:
    """The value of an input, its text emptied where its name or its form says that it is nobody else's business."""
    if not isinstance(value, str):
        return value
    if SECRET_NAMES.search(name) or name.lower() in SECRET_NAMES_ALONE:
        return ""
    return SECRET_VALUES.sub("", value)
