"""The Merge LoRAs node."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from comfy_api.latest import io

from ..lora_files.layers import layers_of
from ..lora_files.merging import CONCATENATE, DARE, METHODS, TIES, Merge, Source, merged
from ..lora_files.opening import LoraFile
from ..training.description import OURS, trigger_words
from ..training.lora_family import family_of, mismatch, title
from .host import folders
from .host.progress import Progress
from .lora_outputs import (
    PRECISIONS,
    file_output,
    file_outputs,
    name_input,
    name_problem,
    precision_input,
    stored_as,
    times_lost,
    write_lora,
)
from .lora_rows import NONE, LoraRow, is_none, stack_rows
from .lora_sources import percent, precision_of, ranks_in_words, size_of, source, state_of
from .sockets import CATEGORY, STACK


class LoraWorkbenchMergeLoras(io.ComfyNode):
    """Writes several LoRAs as one file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraWorkbenchMergeLoras",
            display_name="Merge LoRAs",
            category=CATEGORY,
            description="Makes one LoRA file of several: exactly their sum, or cut to a rank.",
            is_output_node=True,
            inputs=[
                STACK.Input(
                    "lora_stack",
                    optional=True,
                    tooltip="LoRAs with their strengths, from any node. They are merged with the two below.",
                ),
                *[widget for number in (1, 2) for widget in _row(number)],
                name_input("merged"),
                io.Combo.Input(
                    "method",
                    options=list(METHODS),
                    tooltip="concatenate: exactly what all do together, ranks add up. svd: the same cut to rank. ties: "
                    "what is large in each and agrees in sign. dare: a random part of each dropped, the rest raised.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip="The new LoRA's rank by svd, ties and dare. 0: in each layer the highest of the files.",
                ),
                io.Float.Input(
                    "density",
                    default=0.5,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="The share of each LoRA's change that ties and dare keep.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Chooses what dare leaves out.",
                ),
                precision_input(),
            ],
            outputs=file_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, name=None) -> bool | str:
        """A name that no file can have is an error before anything runs."""
        return name_problem(name)

    @classmethod
    def fingerprint_inputs(cls, lora_stack=None, **given) -> list:
        """Another file of the same name is another input, and so is one that this node wrote and that is gone."""
        return [*state_of([row.name for row in rows_of(lora_stack, **given)]), times_lost(cls.hidden.unique_id)]

    @classmethod
    def execute(cls, name, method, rank, density, seed, precision, lora_stack=None, **given) -> io.NodeOutput:
        folders.new_lora_path(name)  # a name from a wire is looked at before the work too
        rows = rows_of(lora_stack, **given)
        if not rows:
            raise ValueError("There is nothing to merge: choose lora_1 and lora_2, or connect a lora_stack.")
        files = [source(row.name) for row in rows]
        check_families(files)
        sources = [
            Source(row.name, file.tensors, row.strength_model, row.strength_clip)
            for row, file in zip(rows, files, strict=True)
        ]
        watch = partial(Progress(cls.hidden.unique_id).encoding, "merging layers")
        told, dtype = entries(files, rows, method, name), PRECISIONS[precision] or precision_of(files)
        # Each layer is rounded as it is made, and the files are let go: real ones have a gigabyte.
        result = merged(sources, method, rank, density, seed, watch=watch, store=partial(stored_as, dtype=dtype))
        del files, sources
        path, written = write_lora(name, result.tensors, told, dtype, cls.hidden.unique_id)
        said = report(rows, result, method, f"'{written}' ({size_of(path)})")
        return file_output(written, said, cls.hidden.unique_id)


def _row(number: int) -> list:
    return [
        io.Combo.Input(
            f"lora_{number}", options=[NONE, *folders.lora_names()], tooltip=f"LoRA {number}, from the loras folder."
        ),
        io.Float.Input(
            f"weight_{number}",
            default=1.0,
            min=-10.0,
            max=10.0,
            step=0.05,
            tooltip=f"How strongly LoRA {number} counts; as a strength in LoRA Stack Apply.",
        ),
    ]


def rows_of(stack, lora_1=NONE, weight_1=1.0, lora_2=NONE, weight_2=1.0, **_) -> list[LoraRow]:
    """The LoRAs to merge: those of the stack, then the node's own; ValueError for what is no stack."""
    own = [LoraRow(lora, weight, weight) for lora, weight in ((lora_1, weight_1), (lora_2, weight_2))]
    return [*stack_rows(stack or ()), *(row for row in own if not is_none(row.name))]


def check_families(files: Sequence[LoraFile]) -> None:
    """ValueError when two files are for different families of models."""
    first, *others = files
    family = family_of(first.entries) or family_of(first.tensors)
    for other in others:
        its = family_of(other.entries) or family_of(other.tensors)
        if its and mismatch(family, its):
            raise ValueError(
                f"'{first.path.name}' is for {title(family)}, but '{other.path.name}' is for {title(its)}: merge LoRAs "
                "of one family."
            )


def entries(files: Sequence[LoraFile], rows: Sequence[LoraRow], method: str, name: str) -> dict[str, str]:
    """What the new file says about itself: what it is for, what calls it, and what it was made of."""
    kept = {}
    for key in (
        "ss_base_model_version",
        "modelspec.architecture",
        "modelspec.implementation",
        "modelspec.prediction_type",
    ):
        if said := {file.entries[key] for file in files if key in file.entries}:
            kept |= {key: min(said)} if len(said) == 1 else {}
    words = dict.fromkeys(word for file in files for word in trigger_words(file.entries))
    if words:
        kept["modelspec.trigger_phrase"] = ", ".join(words)
    parts = "; ".join(f"{row.name} {row.strength_model:g} {row.strength_clip:g}" for row in rows)
    return kept | {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": name,
        "modelspec.merged_from": ", ".join(file.path.name for file in files),
        "ss_network_module": "networks.lora",
        f"{OURS}merged": f"{method}: {parts}",
    }


def report(rows: Sequence[LoraRow], result: Merge, method: str, written: str) -> str:
    """What was merged, how, and how much of it is kept."""
    ranks = [layer.rank for layer in layers_of(result.tensors).values() if layer.rank]
    size = f", {ranks_in_words(ranks)}" if ranks else ""
    left = {TIES: " left by trimming and electing signs", DARE: " left after dropping"}.get(method, "")
    effect = (
        "exactly what the LoRAs do together"
        if method == CONCATENATE
        else f"keeps {percent(result.kept)} of what was{left or ' to be merged'}"
    )
    lines = [f"{written}: {len(layers_of(result.tensors))} layers{size}; {effect}."]
    lines += [f"{row.name}: model {row.strength_model:g}, clip {row.strength_clip:g}" for row in rows]
    return "\n".join([*lines, *result.notes])
