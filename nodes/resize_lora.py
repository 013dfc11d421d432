"""The Resize LoRA node."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from comfy_api.latest import io

from ..lora_files.resizing import Resize, resized
from .host import folders
from .host.progress import Progress
from .lora_outputs import (
    PRECISIONS,
    file_output,
    file_outputs,
    name_input,
    name_problem,
    precision_input,
    times_lost,
    write_lora,
)
from .lora_rows import NONE
from .lora_sources import (
    chosen,
    lora_inputs,
    lora_problem,
    percent,
    precision_of,
    ranks_in_words,
    size_of,
    state_of,
)
from .sockets import CATEGORY

RANK, ENERGY, RATIO = WAYS = ("rank", "energy", "ratio")


class LoraWorkbenchResizeLora(io.ComfyNode):
    """Writes a LoRA again at a lower rank, and says how much of its effect is left."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraWorkbenchResizeLora",
            display_name="Resize LoRA",
            category=CATEGORY,
            description="Makes a LoRA file smaller and says how much of its effect is kept.",
            is_output_node=True,
            inputs=[
                *lora_inputs("The LoRA to resize. It stays as it is."),
                name_input("resized"),
                io.Combo.Input(
                    "by",
                    options=list(WAYS),
                    tooltip="rank: the same for all layers. energy: as little of each layer as keeps a share of it. "
                    "ratio: all that is not much smaller than the largest part of its layer.",
                ),
                io.Int.Input(
                    "rank", default=16, min=1, max=1024, tooltip="The highest rank a layer may have, by rank."
                ),
                io.Float.Input(
                    "energy",
                    default=0.95,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="By energy: how much of each layer's squared change to keep; 0.95 is 97.5 % of its size.",
                ),
                io.Float.Input(
                    "ratio",
                    default=0.1,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="By ratio: parts smaller than this share of the largest in their layer are left out.",
                ),
                precision_input(),
            ],
            outputs=file_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, lora=NONE, name=None) -> bool | str:
        """A LoRA that is gone, or a name that no file can have, is an error before anything runs."""
        problem = lora_problem(lora)
        return name_problem(name) if problem is True else problem

    @classmethod
    def fingerprint_inputs(cls, lora, lora_name=None, **_) -> list:
        """Another file of the same name is another input, and so is one that this node wrote and that is gone."""
        return [*state_of([lora_name or lora]), times_lost(cls.hidden.unique_id)]

    @classmethod
    def execute(cls, lora, name, by, rank, energy, ratio, precision, lora_name=None) -> io.NodeOutput:
        folders.new_lora_path(name)  # a name from a wire is looked at before the work too
        file = chosen(lora, lora_name)
        wanted = {RANK: {"rank": rank}, ENERGY: {"energy": energy}, RATIO: {"ratio": ratio}}[by]
        watch = partial(Progress(cls.hidden.unique_id).encoding, "resizing layers")
        result = resized(file.tensors, **wanted, watch=watch)
        entries = told(file.entries, max(result.ranks.values()))
        path, written = write_lora(
            name, result.tensors, entries, PRECISIONS[precision] or precision_of([file]), cls.hidden.unique_id
        )
        return file_output(written, report(file.path, path, written, result), cls.hidden.unique_id)


def told(entries: Mapping[str, str], rank: int) -> dict[str, str]:
    """What the new file says of itself: all that the old one did but its ranks.

    diffusers believes the ranks of its own entry, and would not load a file of others.
    """
    kept = {key: value for key, value in entries.items() if key != "lora_adapter_metadata"}
    return kept | {"ss_network_dim": str(rank), "ss_network_alpha": "Dynamic"}


def report(before, after, name: str, result: Resize) -> str:
    """What became smaller, and what of the effect is left."""
    sizes = f"{size_of(before)} -> {size_of(after)}"
    lines = [
        f"{sizes} keeps {percent(result.kept)} of the effect.",
        f"'{name}': {len(result.ranks)} layers, {ranks_in_words(list(result.ranks.values()))}.",
        *result.notes,
    ]
    if after.stat().st_size >= before.stat().st_size:
        lines.insert(1, "It did not become smaller: choose a lower rank, energy or a higher ratio.")
    return "\n".join(lines)
