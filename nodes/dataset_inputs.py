"""The inputs of the LoRA Dataset Loader node: what is read, how it is trained, what comes from other nodes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..training.augmentation import Augmentation
from ..training.dataset import ROLES, TRAIN, Example, resolutions_in
from ..training.listing import KOHYA, SUB_FOLDERS
from ..training.masks import FILES_AND_ALPHA, SOURCES
from ..training.wording import Wording
from .sockets import DATASET

AUTOMATIC = -1

FIRST = [
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
]

# Optional, so that graphs saved before they were there still run.
READING = [
    io.Combo.Input(
        "role",
        options=list(ROLES),
        default=TRAIN,
        optional=True,
        tooltip="train: learned. regularization: pictures of the class, kept as they are. validation: all held out.",
    ),
    io.Combo.Input(
        "sub_folders",
        options=list(SUB_FOLDERS),
        default=KOHYA,
        optional=True,
        tooltip="Which are read. each a concept: the name of a sub-folder is the trigger word of its pictures.",
    ),
    io.Float.Input(
        "weight",
        default=1.0,
        min=0.01,
        max=10.0,
        step=0.05,
        optional=True,
        advanced=True,
        tooltip="How much these pictures count: a factor on their loss.",
    ),
    io.Combo.Input(
        "mask_source",
        options=list(SOURCES),
        default=FILES_AND_ALPHA,
        optional=True,
        advanced=True,
        tooltip="Where masks come from: NAME_mask.png, NAME-masklabel.png, masks/NAME.png, see-through parts.",
    ),
    io.String.Input(
        "background",
        default="white",
        optional=True,
        advanced=True,
        tooltip="The colour behind see-through parts, by name or as #rrggbb.",
    ),
]

TRAINING = [
    io.String.Input(
        "extra_resolutions",
        default="",
        optional=True,
        advanced=True,
        tooltip="Further sizes to train at, such as 512, 768. Small pictures are left out of the larger ones.",
    ),
    io.Float.Input(
        "largest_enlargement",
        default=0.0,
        min=0.0,
        max=8.0,
        step=0.1,
        optional=True,
        advanced=True,
        tooltip="Small pictures are enlarged at most this many times, else trained smaller. 0 = no limit.",
    ),
    io.Boolean.Input(
        "shuffle_tags",
        default=Wording.shuffle_tags,
        optional=True,
        advanced=True,
        tooltip="For captions of tags: another order every time.",
    ),
    io.Int.Input(
        "keep_first",
        default=Wording.keep_first,
        min=0,
        max=100,
        optional=True,
        advanced=True,
        tooltip="So many tags stay in front and are never left out.",
    ),
    io.Float.Input(
        "tag_dropout",
        default=Wording.tag_dropout,
        min=0.0,
        max=1.0,
        step=0.05,
        optional=True,
        advanced=True,
        tooltip="How often each of the other tags is left out.",
    ),
    io.Float.Input(
        "caption_dropout",
        default=Wording.caption_dropout,
        min=0.0,
        max=1.0,
        step=0.05,
        optional=True,
        advanced=True,
        tooltip="How often a picture is shown without any caption. 0.05 to 0.1 helps a style.",
    ),
    io.Int.Input(
        "variants",
        default=Augmentation.variants,
        min=1,
        max=32,
        optional=True,
        advanced=True,
        tooltip="Versions of each picture that take turns when crop_jitter, flip or colour is on, each encoded once.",
    ),
    io.Float.Input(
        "crop_jitter",
        default=Augmentation.crop_jitter,
        min=0.0,
        max=0.5,
        step=0.01,
        optional=True,
        advanced=True,
        tooltip="How far the crop of the versions moves and shrinks, as a share of the picture.",
    ),
    io.Boolean.Input(
        "flip",
        default=Augmentation.flip,
        optional=True,
        advanced=True,
        tooltip="Mirror every second version. Not for faces or writing.",
    ),
    io.Float.Input(
        "colour",
        default=Augmentation.colour,
        min=0.0,
        max=0.5,
        step=0.01,
        optional=True,
        advanced=True,
        tooltip="How much brightness, contrast and saturation of the versions change.",
    ),
]

FROM_THE_GRAPH = [
    io.Image.Input(
        "images", optional=True, tooltip="Pictures from other nodes, kept in the output folder. folder is not read."
    ),
    io.String.Input(
        "captions", optional=True, force_input=True, tooltip="Captions for images: one for each, or one for all."
    ),
    io.Mask.Input("masks", optional=True, tooltip="Masks for images: one for each, or one for all. White is learned."),
    DATASET.Input(
        "dataset",
        optional=True,
        tooltip="Another Dataset Loader, whose pictures are added. How all are trained is set in this one.",
    ),
    io.Clip.Input("clip", optional=True, tooltip="To count the tokens of the captions against the model's limit."),
]

# Saved workflows know widgets by their place, so what came later is at the end.
LATER = [
    io.Boolean.Input(
        "fill_masked",
        default=Example.fill_masked,
        optional=True,
        advanced=True,
        tooltip="Paint over what is black in masks, so that the model never sees it: noise, writing, other people.",
    ),
]

INPUTS = [*FIRST, *READING, *TRAINING, *FROM_THE_GRAPH, *LATER]
LISTS = ("images", "captions", "masks")


def values_of(given: Mapping[str, list]) -> dict[str, Any]:
    """The inputs, each a list as ComfyUI hands them to a node that takes lists; of all but LISTS the first counts.

    What is not given has its default; what is connected to nothing that ran is left out.
    """
    values: dict[str, Any] = {entry.id: getattr(entry, "default", None) for entry in INPUTS}
    for name, entries in given.items():
        present = [entry for entry in entries if entry is not None]
        values[name] = present if name in LISTS else present[0] if present else values[name]
    return values


def training_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a Dataset that say how it is trained; ValueError names the input that cannot be."""
    wording = {name: values[name] for name in ("shuffle_tags", "keep_first", "tag_dropout", "caption_dropout")}
    augmentation = {name: values[name] for name in ("variants", "crop_jitter", "flip", "colour")}
    return {
        "resolution": values["resolution"],
        "resolutions": resolutions_in(values["extra_resolutions"], values["resolution"]),
        "background": values["background"].strip(),
        "largest_enlargement": values["largest_enlargement"],
        "wording": Wording(**wording),
        "augmentation": Augmentation(**augmentation),
    }
