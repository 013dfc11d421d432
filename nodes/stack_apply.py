"""The LoRA Stack Apply node."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from comfy_api.latest import io

from ..training.description import recommended, trigger_words
from ..training.lora_family import mismatch, title
from .host import folders, loras
from .host.blocks import block_strengths, share
from .host.lora_chain import SHELF, Chain, ReadLora, version_of
from .host.xray import Applied
from .host.xray import xray as look_through
from .lora_names import found
from .lora_rows import NONE, OLD_ROWS, LoraRow, json_rows, prompt_rows, stack_rows, widget_rows
from .sockets import CATEGORY, STACK

FIRST_ROWS = 2
"""Rows that are shown at once; the others wait behind "show advanced"."""
SHOWN_FROM_CACHE = {"has_intermediate_output": True} if hasattr(io.Schema, "has_intermediate_output") else {}
"""Where ComfyUI knows this, the page is told of the x-ray also when nothing had to be computed anew."""
ERROR, SKIP = "error", "skip with a note"
SHORT, FULL, OFF = "short", "full", "off"


class LoraWorkbenchStackApply(io.ComfyNode):
    """Puts LoRAs on a model in order, exactly as chained Load LoRA nodes would."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        names = folders.lora_names()
        return io.Schema(
            node_id="LoraWorkbenchStackApply",
            display_name="LoRA Stack Apply",
            category=CATEGORY,
            description="Puts any number of LoRAs on a model, like a chain of Load LoRA nodes.",
            inputs=[
                io.Model.Input("model", tooltip="The model to put the LoRAs on."),
                io.Clip.Input("clip", optional=True, tooltip="Its CLIP. Without one only the model is changed."),
                STACK.Input(
                    "lora_stack", optional=True, tooltip="A stack from any node. It is applied before the rows."
                ),
                *[widget for number in range(1, OLD_ROWS + 1) for widget in row_inputs(number, names)],
                io.String.Input(
                    "rows",
                    default="[]",
                    optional=True,
                    socketless=True,
                    advanced=True,
                    tooltip="More rows, as JSON: lora, model, clip, on, blocks. Without a strength the recommended one "
                    "is taken.",
                ),
                io.Combo.Input(
                    "missing",
                    options=[ERROR, SKIP],
                    default=ERROR,
                    optional=True,
                    advanced=True,
                    tooltip="What to do when a LoRA file is gone: stop before anything runs, or go on without it.",
                ),
                io.String.Input(
                    "prompt",
                    optional=True,
                    force_input=True,
                    tooltip="A prompt with <lora:name:0.8:0.6> in it. Those LoRAs come last, and the tags are removed.",
                ),
                io.Combo.Input(
                    "xray",
                    options=[SHORT, FULL, OFF],
                    default=SHORT,
                    optional=True,
                    advanced=True,
                    tooltip="How closely the report looks at the LoRAs: families, norms, overlaps and fights.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with all LoRAs on."),
                io.Clip.Output("clip", tooltip="The CLIP with all LoRAs on."),
                STACK.Output("lora_stack", tooltip="The stack that came in plus the rows that are on."),
                io.String.Output("trigger_words", tooltip="The trigger words the files name, joined by commas."),
                io.String.Output("report", tooltip="What was applied, at which strength, and what it does."),
                io.String.Output("prompt", tooltip="The prompt without its LoRA tags."),
            ],
            hidden=[io.Hidden.unique_id],
            **SHOWN_FROM_CACHE,
        )

    @classmethod
    def validate_inputs(
        cls,
        lora_1=NONE,
        lora_2=NONE,
        lora_3=NONE,
        lora_4=NONE,
        on_1=True,
        on_2=True,
        on_3=True,
        on_4=True,
        rows="[]",
        missing=ERROR,
    ) -> bool | str:
        """A row whose file is gone is an error before anything runs; one that is off may name what it likes."""
        widgets = {"lora_1": lora_1, "lora_2": lora_2, "lora_3": lora_3, "lora_4": lora_4}
        widgets |= {"on_1": on_1, "on_2": on_2, "on_3": on_3, "on_4": on_4}
        try:
            asked = [row for row in (*widget_rows(widgets), *json_rows(rows)) if row.on]
            named(asked, missing)
            for row in asked:
                block_strengths(row.blocks)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, rows="[]", **widgets) -> list:
        """A file of a row that was written anew is put on anew; nothing is read for this."""
        with suppress(ValueError):
            versions = map(version_of, files_of([*widget_rows(widgets), *json_rows(rows)]))
            # ComfyUI writes it into pictures, as JSON: nobody need read there where the file lies.
            return [[path.name, *facts] for path, *facts in versions]
        return []

    @classmethod
    def execute(
        cls, model, clip=None, lora_stack=None, rows="[]", missing=ERROR, prompt=None, xray=SHORT, **widgets
    ) -> io.NodeOutput:
        tagged, plain = prompt_rows(prompt)
        # A stack is a list that others may still hold: it is read and never changed.
        asked = [*stack_rows(lora_stack or ()), *widget_rows(widgets), *json_rows(rows), *tagged]
        wanted, notes = named([row for row in asked if row.on], missing)
        chain = Chain(model, clip)
        applied, stack, left_out = put_on(chain, wanted, loras.model_family(model))
        # Also what is switched off for now: switching it on again reads nothing.
        SHELF.keep(cls.hidden.unique_id, files_of([*wanted, *(row for row in asked if not row.on)]))
        triggers = dict.fromkeys(word for one in applied for word in trigger_words(one.entries))
        lines, table = [*notes, *left_out], None
        if applied and xray != OFF:
            seen = look_through(model, clip, applied, xray, chain.keys)
            lines, table = [*lines, seen.to_text()], {"lora_workbench_stack": [seen.table()]}
        else:
            lines += [line_about(one, clip is not None) for one in applied]
        report = "\n".join(lines) or "No LoRA is on."
        return io.NodeOutput(chain.model, chain.clip, stack, ", ".join(triggers), report, plain, ui=table)


def row_inputs(number: int, names: list[str]) -> list:
    """The four widgets of one of the first rows."""
    hidden = number > FIRST_ROWS
    strength = {"default": 1.0, "min": -100.0, "max": 100.0, "step": 0.05, "optional": True, "advanced": hidden}
    return [
        io.Combo.Input(
            f"lora_{number}",
            options=[NONE, *names],
            optional=True,
            tooltip=f"LoRA {number}, from the loras folder.",
            advanced=hidden,
        ),
        io.Float.Input(
            f"strength_model_{number}", tooltip=f"How strongly LoRA {number} changes the model.", **strength
        ),
        io.Float.Input(f"strength_clip_{number}", tooltip=f"How strongly LoRA {number} changes the CLIP.", **strength),
        io.Boolean.Input(
            f"on_{number}",
            default=True,
            optional=True,
            tooltip=f"Whether LoRA {number} is applied.",
            advanced=hidden,
        ),
    ]


def named(rows: Sequence[LoraRow], missing: str) -> tuple[list[LoraRow], list[str]]:
    """The rows with the names of the files they mean, and what to say of those that are left out.

    ValueError for a file that is missing, unless it is to be skipped.
    """
    names = folders.lora_names()
    files = [found(row.name, names) for row in rows]
    gone = [file.note for file in files if not file.name]
    if gone and missing != SKIP:
        raise ValueError(gone[0])
    there = [replace(row, name=file.name, note=file.note) for row, file in zip(rows, files, strict=True) if file.name]
    return there, [f"Left out: {note}" for note in gone]


def put_on(chain: Chain, rows: Sequence[LoraRow], family: str) -> tuple[list[Applied], list[tuple], list[str]]:
    """Put the rows' LoRAs on the chain: what was applied, the rows as a stack, and notes on what did nothing."""
    applied, stack, notes = [], [], []
    for row in rows:
        file = None
        if row.reaches(chain.clip is not None) or None in (row.strength_model, row.strength_clip):
            file = SHELF.take(folders.lora_path(row.name))
            check_family(file, family)
            row = row.settled(recommended(file.entries))
        stack.append((row.name, row.strength_model, row.strength_clip))
        if file is None or not row.reaches(chain.clip is not None):
            notes.append(f"{row.name}: left out, its strength is 0")
            continue
        strengths, by_block = (row.strength_model, row.strength_clip), block_strengths(row.blocks)
        patches = chain.add(file, *strengths, by_block)
        note = "; ".join(filter(None, (row.note, by_block and share(patches, row.blocks))))
        about = {"entries": file.entries, "content": file.version, "blocks": by_block, "note": note}
        applied.append(Applied(row.name, file.tensors, patches, *strengths, **about))
    return applied, stack, notes


def check_family(file: ReadLora, given: str) -> None:
    """ValueError naming both families when the file was made for another family than the model's.

    What a file says is wrong now and then: where its layers are the model's, it is put on, as Load LoRA would.
    """
    if file.families and all(mismatch(family, given) for family in file.families):
        made_for = title(file.families[0])
        raise ValueError(
            f"The LoRA '{file.version[0].name}' is for {made_for}, but the model is {title(given)}: choose a LoRA for "
            f"{title(given)}, or load a {made_for} model."
        )


def files_of(rows: Iterable[LoraRow]) -> list[Path]:
    """The files of the rows that are where the rows say."""
    paths = []
    for row in rows:
        with suppress(ValueError):
            paths.append(folders.lora_path(row.name))
    return paths


def line_about(one: Applied, with_clip: bool) -> str:
    """What was done with one LoRA."""
    strengths = f"model {one.strength_model:g}" + (f", clip {one.strength_clip:g}" if with_clip else "")
    layers = len(one.patches)
    reached = "1 layer" if layers == 1 else f"{layers} layers" if layers else "NO layer of this model fits it"
    advised = recommended(one.entries)
    line = f"{one.name}: {strengths}{f' (recommended {advised:g})' if advised else ''}, {reached}"
    return f"{line} ({one.note})" if one.note else line
