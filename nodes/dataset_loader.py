"""The LoRA Dataset Loader node."""

from __future__ import annotations

import hashlib

from comfy_api.latest import io, ui

from ..training import contact_sheet
from ..training.folder import scan
from ..training.dataset_report import describe
from .host import folders
from .pictures import to_image
from .sockets import CATEGORY, DATASET

AUTOMATIC = -1


class LoraWorkbenchDatasetLoader(io.ComfyNode):
    """Reads a folder of pictures with captions, shows it, and says what is wrong with it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraWorkbenchDatasetLoader",
            display_name="LoRA Dataset Loader",
            category=CATEGORY,
            description="Reads a folder of pictures, each with a text file of the same name beside it.",
            inputs=[
                io.String.Input(
                    "folder",
                    default="my_subject",
                    tooltip="The folder with the pictures: a full path, or a folder in ComfyUI's input folder.",
                ),
                io.String.Input(
                    "trigger_word",
                    default="",
                    tooltip="The word that calls the LoRA, best one without a meaning. Added to captions without it.",
                ),
                io.Int.Input(
                    "resolution",
                    default=1024,
                    min=64,
                    max=4096,
                    step=8,
                    tooltip="Pictures are trained at about this size, in their own shape. 1024 suits SDXL and FLUX.",
                ),
                io.Int.Input(
                    "repeats",
                    default=1,
                    min=1,
                    max=1000,
                    tooltip="How often an epoch shows each picture. A sub-folder 10_name counts ten times as often.",
                ),
                io.Int.Input(
                    "hold_out",
                    default=AUTOMATIC,
                    min=AUTOMATIC,
                    max=100,
                    tooltip="Pictures kept out, to find the best checkpoint. -1 = a few, from ten pictures on.",
                ),
            ],
            outputs=[
                DATASET.Output("dataset", tooltip="For LoRA Auto-Captioner and LoRA Trainer."),
                io.Image.Output(
                    "contact_sheet", tooltip="Every picture with the part that is trained on, and its caption."
                ),
                io.String.Output("report", tooltip="What was found, and what is wrong with it."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, folder: str, **_inputs) -> str:
        """Changes when a picture or caption is added, removed or edited, so that ComfyUI reads the folder again."""
        state = folders.folder_state(folders.dataset_folder(folder))
        return hashlib.sha256(repr(state).encode()).hexdigest()

    @classmethod
    def execute(cls, folder, trigger_word, resolution, repeats, hold_out) -> io.NodeOutput:
        dataset = scan(
            folders.dataset_folder(folder),
            trigger_word=trigger_word,
            resolution=resolution,
            hold_out=None if hold_out == AUTOMATIC else hold_out,
            repeats=repeats,
        )
        sheet = to_image(contact_sheet.draw(dataset))
        return io.NodeOutput(dataset, sheet, describe(dataset), ui=ui.PreviewImage(sheet, cls=cls))
