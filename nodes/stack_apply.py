"""The LoRA Stack Apply node."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from comfy_api.latest import io

from ..training.description import STRENGTH, trigger_words
from ..training.lora_family import family_of, mismatch, title
from .host import folders, loras
from .sockets import CATEGORY, STACK

NONE = "none"
ROWS = 4
FIRST_ROWS = 2
"""Rows that are shown at once; the others wait behind "show advanced"."""

Row = tuple[str, float, float]


class LoraWorkbenchStackApply(io.ComfyNode):
    """Puts LoRAs on a model in order, exactly as chained Load LoRA nodes would."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = folders.lora_names()
        return io.Schema(
            node_id="LoraWorkbenchStackApply",
            display_name="LoRA Stack Apply",
            category=CATEGORY,
            description="Puts a stack and up to four more LoRAs on a model, like a chain of Load LoRA nodes.",
            inputs=[
                io.Model.Input("model", tooltip="The model to put the LoRAs on."),
                io.Clip.Input("clip", optional=True, tooltip="Its CLIP. Without one only the model is changed."),
                STACK.Input(
                    "lora_stack", optional=True, tooltip="A stack from any node. It is applied before the rows."
                ),
                *[widget for number in range(1, ROWS + 1) for widget in row_inputs(number, names)],
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with all LoRAs on."),
                io.Clip.Output("clip", tooltip="The CLIP with all LoRAs on."),
                STACK.Output("lora_stack", tooltip="The stack that came in plus the rows that are on."),
                io.String.Output("trigger_words", tooltip="The trigger words the files name, joined by commas."),
                io.String.Output("report", tooltip="What was applied, at which strength, and to how many layers."),
            ],
        )

    @classmethod
    def validate_inputs(
        cls, lora_1=NONE, lora_2=NONE, lora_3=NONE, lora_4=NONE, on_1=True, on_2=True, on_3=True, on_4=True
    ) -> bool | str:
        """A row whose file is gone is an error before anything runs; one that is off may name what it likes."""
        for name, on in ((lora_1, on_1), (lora_2, on_2), (lora_3, on_3), (lora_4, on_4)):
            if on and not is_none(name):
                try:
                    folders.lora_path(name)
                except ValueError as error:
                    return str(error)
        return True

    @classmethod
    def execute(cls, model, clip=None, lora_stack=None, **rows) -> io.NodeOutput:
        # A stack is a list that others may still hold: it is read and never changed.
        stack = [*stacked(lora_stack or ()), *active_rows(rows)]
        paths = {name: folders.lora_path(name) for name, *_ in stack}
        files: dict[Path, tuple[dict, dict[str, str]]] = {}
        triggers, lines = [], []
        for name, strength_model, strength_clip in stack:
            if not (strength_model or (strength_clip and clip is not None)):
                lines.append(f"{name}: left out, its strength is 0")
                continue
            path = paths[name]
            if path not in files:
                files[path] = loras.read_lora(path), loras.read_metadata(path)
                check_family(path, *files[path], loras.model_family(model))
            lora, described = files[path]
            before = loras.patched_layers(model, clip)
            model, clip = loras.apply(model, clip, lora, strength_model, strength_clip, described)
            layers = loras.patched_layers(model, clip) - before
            lines.append(line_about(name, strength_model, None if clip is None else strength_clip, layers, described))
            triggers += [word for word in trigger_words(described) if word not in triggers]
        return io.NodeOutput(model, clip, stack, ", ".join(triggers), "\n".join(lines) or "No LoRA is on.")


def row_inputs(number: int, names: list[str]) -> list:
    """The four widgets of a row."""
    hidden = number > FIRST_ROWS
    strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.05, "advanced": hidden}
    return [
        io.Combo.Input(
            f"lora_{number}",
            options=[NONE, *names],
            tooltip=f"LoRA {number}, from the loras folder.",
            advanced=hidden,
        ),
        io.Float.Input(
            f"strength_model_{number}", tooltip=f"How strongly LoRA {number} changes the model.", **strength
        ),
        io.Float.Input(f"strength_clip_{number}", tooltip=f"How strongly LoRA {number} changes the CLIP.", **strength),
        io.Boolean.Input(f"on_{number}", default=True, tooltip=f"Whether LoRA {number} is applied.", advanced=hidden),
    ]


def is_none(name: str | None) -> bool:
    """Whether a row or an entry of a stack names no LoRA; other packs write "None"."""
    return not name or name.lower() == NONE


def stacked(entries: Iterable) -> list[Row]:
    """The entries of a stack that name a LoRA; ValueError for one that is no (name, strength, strength)."""
    try:
        rows = [(name, float(strength_model), float(strength_clip)) for name, strength_model, strength_clip in entries]
    except (TypeError, ValueError) as error:
        raise ValueError(
            "lora_stack holds something else than (name, strength_model, strength_clip): connect a LORA_STACK output."
        ) from error
    return [row for row in rows if not is_none(row[0])]


def active_rows(rows: dict) -> list[Row]:
    """The rows that name a LoRA and are on, in order."""
    return [
        (rows[f"lora_{number}"], rows[f"strength_model_{number}"], rows[f"strength_clip_{number}"])
        for number in range(1, ROWS + 1)
        if not is_none(rows.get(f"lora_{number}")) and rows.get(f"on_{number}", True)
    ]


def check_family(path: Path, lora: dict, described: dict[str, str], given: str) -> None:
    """ValueError naming both families when the file was made for another family than the model's."""
    made_for = family_of(described) or family_of(lora)
    if mismatch(made_for, given):
        raise ValueError(
            f"The LoRA '{path.name}' is for {title(made_for)}, but the model is {title(given)}: choose a LoRA for "
            f"{title(given)}, or load a {title(made_for)} model."
        )


def line_about(
    name: str, strength_model: float, strength_clip: float | None, layers: int, described: Mapping[str, str]
) -> str:
    """What was done with one LoRA; no `strength_clip` where there is no CLIP."""
    strengths = f"model {strength_model:g}" + ("" if strength_clip is None else f", clip {strength_clip:g}")
    reached = "1 layer" if layers == 1 else f"{layers} layers" if layers else "NO layer of this model fits it"
    recommended = described.get(STRENGTH, "")
    return f"{name}: {strengths}{f' (recommended {recommended})' if recommended else ''}, {reached}"
