"""The Inspect LoRA node."""

from __future__ import annotations

import json
from pathlib import Path, PureWindowsPath

from comfy_api.latest import io, ui

from ..lora_files.inspection import inspection
from ..lora_files.inspection_chart import picture
from ..lora_files.opening import open_lora
from ..training.whole_file import write_atomically
from .host import folders
from .host.reproduction import workflow_of
from .lora_rows import NONE
from .lora_sources import chosen_name, lora_inputs, lora_problem, state_of
from .pictures import to_image
from .sockets import CATEGORY


class LoraWorkbenchInspectLora(io.ComfyNode):
    """Says everything a LoRA file says about itself and everything its weights say."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraWorkbenchInspectLora",
            display_name="Inspect LoRA",
            category=CATEGORY,
            description="Shows what is in a LoRA file: what it says about itself, what its weights say, what is wrong.",
            is_output_node=True,
            inputs=[
                *lora_inputs("The LoRA to look into."),
                io.Boolean.Input(
                    "write_workflow",
                    default=False,
                    tooltip="Also write the workflow that trained this LoRA, for files that LoRA Trainer made. Drop it "
                    "onto ComfyUI's canvas to open it.",
                ),
            ],
            outputs=[
                io.String.Output("report", tooltip="What the file and its weights say, and what is wrong with them."),
                io.Image.Output("chart", tooltip="How much each block is changed, at which rank, in which network."),
                io.String.Output("workflow", tooltip="The path of the workflow that was written, or nothing."),
            ],
        )

    @classmethod
    def validate_inputs(cls, lora=NONE) -> bool | str:
        """A LoRA that is gone is an error before anything runs."""
        return lora_problem(lora)

    @classmethod
    def fingerprint_inputs(cls, lora, lora_name=None, **_) -> list:
        """Another file of the same name is another input."""
        return state_of([lora_name or lora])

    @classmethod
    def execute(cls, lora, write_workflow, lora_name=None) -> io.NodeOutput:
        name = chosen_name(lora, lora_name)
        found = inspection(open_lora(folders.lora_path(name)))
        report, chart = found.text(), to_image(picture(found))
        workflow = write_graph(name) if write_workflow else None
        shown = ui.PreviewImage(chart, cls=cls).as_dict()
        if workflow:
            report += f"\n\nThe workflow that made it is in '{workflow}': drop it onto the canvas."
            place = workflow.parent.relative_to(folders.output_folder()).as_posix()
            shown |= {"lora_workbench_workflow": [{"filename": workflow.name, "subfolder": place, "type": "output"}]}
        return io.NodeOutput(report, chart, str(workflow or ""), ui=shown | ui.PreviewText(report).as_dict())


def write_graph(name: str) -> Path:
    """Write the graph that trains a LoRA again, in API form, below ComfyUI's output folder; returns where.

    ValueError when the file does not say how it was made, or the folder cannot be written to.
    """
    graph = json.dumps(workflow_of(folders.lora_path(name)), indent=2, ensure_ascii=False).encode(errors="replace")
    folder = folders.workflows_folder()
    target = folder / f"{'_'.join(PureWindowsPath(name).with_suffix('').parts)}.json"
    if not folder.resolve().is_relative_to(folders.output_folder().resolve()):
        raise ValueError(f"'{folder}' leads out of ComfyUI's output folder, so nothing was written: remove that link.")
    try:
        if not target.is_file() or target.read_bytes() != graph:
            write_atomically(target, graph)
    except OSError as error:
        raise ValueError(f"'{target}' cannot be written: {error.strerror or error}.") from error
    return target
