"""How the nodes that make LoRA files of LoRA files write them, and what they hand on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
from comfy_api.latest import io
from torch import Tensor

from ..lora_files.layers import EXACT
from ..training.lora_file import file_bytes
from ..training.whole_file import write_atomically
from .host import folders
from .host.progress import Progress
from .sockets import STACK

AS_IT_IS = "as it is"
PRECISIONS = {AS_IT_IS: None, "fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
MOST_VERSIONS = 1000


def name_input(example: str) -> io.String.Input:
    """The widget for the name of the new file."""
    return io.String.Input(
        "name",
        default=example,
        tooltip="What the new file is called in the loras folder; a sub-folder may stand before it, as in people/anna. "
        "Another file of that name is never overwritten: the new one gets _v2, _v3 and so on.",
    )


def precision_input(default: str = AS_IT_IS) -> io.Combo.Input:
    """The widget for the precision of the new file."""
    return io.Combo.Input(
        "precision",
        options=list(PRECISIONS),
        default=default,
        tooltip="How exactly numbers are stored. fp16 and bf16 take half the room of fp32.",
    )


def file_outputs() -> list:
    """The three outputs of every node that writes a LoRA file."""
    return [
        STACK.Output("lora_stack", tooltip="The new file at strength 1, for LoRA Stack Apply."),
        io.String.Output("lora_name", tooltip="The new file's name as LoRA loaders list it."),
        io.String.Output("report", tooltip="What was done, and where the new file is."),
    ]


def file_output(name: str, report: str, node_id: str | None) -> io.NodeOutput:
    """The values of those outputs; the report also stands on the node."""
    Progress(node_id).line(report)
    return io.NodeOutput([(name, 1.0, 1.0)], name, report)


_made: dict[str, Path] = {}
_lost: Counter[str] = Counter()


def name_problem(name: str | None) -> bool | str:
    """What `validate_inputs` answers about a name: True, or why no file can be called so; None comes from a wire."""
    try:
        return name is None or bool(folders.new_lora_path(name))
    except ValueError as error:
        return str(error)


def times_lost(node_id: str | None) -> int:
    """How often the file that a node wrote last was found gone. Then it is made again though no input has changed."""
    path = _made.get(node_id)
    if path is not None and not path.is_file():
        del _made[node_id]
        _lost[node_id] += 1
    return _lost[node_id]


def write_lora(
    name: str,
    tensors: Mapping[str, Tensor],
    entries: Mapping[str, str],
    dtype: torch.dtype | None = None,
    node_id: str | None = None,
) -> tuple[Path, str]:
    """Write a LoRA file into the loras folder: its path, and its name as loaders list it.

    A file that is there already with the same content stays as it is; one with another content is not overwritten, and
    the new one gets `_v2`, `_v3` and so on. ValueError for a name that cannot be one, and for values that do not fit.
    """
    path, written = _written(name, tensors, entries, dtype)
    if node_id is not None:
        _made[node_id] = path
    return path, written


def _written(
    name: str, tensors: Mapping[str, Tensor], entries: Mapping[str, str], dtype: torch.dtype | None
) -> tuple[Path, str]:
    path = folders.new_lora_path(name)
    stored = {key: stored_as(key, tensor, dtype) for key, tensor in tensors.items()}
    data = file_bytes(stored, dict(entries))
    for number in range(1, MOST_VERSIONS):
        found = path if number == 1 else path.with_name(f"{path.stem}_v{number}{path.suffix}")
        try:
            if not found.exists():
                write_atomically(found, data)
            elif not _holds(found, data):
                continue
        except OSError as error:
            raise ValueError(
                f"'{found.name}' cannot be written to the loras folder: {error.strerror or error}."
            ) from error
        return found, str(found.relative_to(folders.loras_folder()))
    raise ValueError(f"There are already {MOST_VERSIONS:,} files called '{path.stem}': choose another name.")


def stored_as(key: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor in that precision; what is `EXACT` and whole numbers stay as they are.

    ValueError for what is not finite.
    """
    if not tensor.is_floating_point():
        return tensor.contiguous()
    stored = tensor if dtype is None or EXACT.search(key) else tensor.to(dtype)
    if not torch.isfinite(stored.float()).all():
        if torch.isfinite(tensor.float()).all():
            raise ValueError(f"'{key}' has values too large for this precision: choose bf16 or fp32.")
        raise ValueError(f"'{key}' has values that are not finite: Inspect LoRA shows which file they come from.")
    return stored.contiguous()


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data
