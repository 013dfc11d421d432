"""The LoRA Dataset Loader node."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from comfy_api.latest import io, ui

from ..training import contact_sheet, handed
from ..training.dataset import TRAIN, Dataset, joined
from ..training.dataset_report import describe
from ..training.doctor import Diagnosis, as_split, examine
from ..training.folder import scan
from ..training.split import split_again
from .dataset_inputs import AUTOMATIC, INPUTS, training_of, values_of
from .host import folders
from .host.progress import Progress
from .host.text_encoders import style_for
from .host.tokens import counter
from .pictures import to_image
from .sockets import CATEGORY, DATASET


class LoraWorkbenchDatasetLoader(io.ComfyNode):
    """Reads pictures with captions and masks, shows them, and says what is wrong with them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraWorkbenchDatasetLoader",
            display_name="LoRA Dataset Loader",
            category=CATEGORY,
            description="Reads a folder of pictures, with captions and masks as other trainers keep them.",
            inputs=INPUTS,
            outputs=[
                DATASET.Output("dataset", tooltip="For LoRA Auto-Captioner and LoRA Trainer."),
                io.Image.Output(
                    "contact_sheet", tooltip="Every picture with the part that is trained on, and its caption."
                ),
                io.String.Output("report", tooltip="What was found, and what is wrong with it."),
            ],
            hidden=[io.Hidden.unique_id],
            is_input_list=True,
        )

    @classmethod
    def fingerprint_inputs(cls, **given) -> str | float:
        """Changes when a picture, caption or mask is added, removed or edited, so that ComfyUI reads them again.

        Of a folder that another node names nothing is known here, so that one is read every time.
        """
        if "images" not in given and None in given.get("folder", ()):
            return float("nan")  # which equals nothing, not even itself
        if "images" in given:  # which ones is not known before they are made; edits of their captions are
            state = [file for file in folders.folder_state(folders.handed_folder()) if file[2] != handed.WRITTEN_AT_NS]
        else:
            state = folders.folder_state(folders.dataset_folder(values_of(given)["folder"]))
        return hashlib.sha256(repr(state).encode()).hexdigest()

    @classmethod
    def execute(cls, **given) -> io.NodeOutput:
        values = values_of(given)
        progress = Progress(cls.hidden.unique_id)
        own = read(values, partial(progress.encoding, "reading pictures"))
        dataset, diagnosis = examined(own, values, partial(progress.encoding, "examining pictures"))
        sheet = to_image(contact_sheet.draw(dataset, diagnosis))
        return io.NodeOutput(dataset, sheet, describe(dataset, diagnosis), ui=ui.PreviewImage(sheet, cls=cls))


def read(values: Mapping[str, Any], progress) -> Dataset:
    """The dataset of the node's inputs alone."""
    return scan(
        _place(values),
        trigger_word=values["trigger_word"],
        hold_out=None if values["hold_out"] == AUTOMATIC else values["hold_out"],
        repeats=values["repeats"],
        role=values["role"],
        weight=values["weight"],
        sub_folders=values["sub_folders"],
        mask_source=values["mask_source"],
        fill_masked=values["fill_masked"],
        progress=progress,
        **training_of(values),
    )


def examined(own: Dataset, values: Mapping[str, Any], progress) -> tuple[Dataset, Diagnosis]:
    """The node's own dataset joined to the one that came in, and what is odd about both together.

    A held-out picture whose near-duplicate is trained on is exchanged for one that has none, where there is one.
    """
    before = [] if values["dataset"] is None else [values["dataset"]]
    diagnosis = examine(joined([*before, own]), progress=progress, **_reader(values["clip"]))
    if values["role"] == TRAIN:
        own = split_again(own, diagnosis.clusters)
    whole = joined([*before, own])
    return whole, as_split(diagnosis, whole)


def _place(values: Mapping[str, Any]) -> Path:
    """The folder to read: what came from other nodes goes before what was typed."""
    images, captions, masks = (values[name] or [] for name in ("images", "captions", "masks"))
    if images:
        return handed.write(folders.handed_folder(), images, captions, masks)
    for name, content in (("captions", captions), ("masks", masks)):
        if content:
            raise ValueError(
                f"{name} is connected but images is not: connect images too, or put files into the folder."
            )
    if not values["folder"].strip():
        raise ValueError("folder is empty: type the folder with the pictures, or connect images.")
    return folders.dataset_folder(values["folder"])


def _reader(clip) -> dict[str, Any]:
    """What the doctor is told about who reads the captions; nothing without a CLIP."""
    if clip is None:
        return {}
    count = counter(clip)
    return {"tokens": count, "limit": count.limit, "style": style_for(clip)}
