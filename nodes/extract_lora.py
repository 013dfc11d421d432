"""The Extract LoRA node."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import chain

from comfy_api.latest import io

from ..lora_files.extraction import Extraction, Pair, extracted
from ..lora_files.model_files import file_pairs
from ..training.description import OURS
from ..training.families import FLUX, SD15, SDXL
from ..training.lora_family import family_of
from .host import folders, loras
from .host.extraction import clip_pairs, model_file_names, model_file_path, model_pairs
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
from .lora_rows import NONE, is_none
from .lora_sources import percent, ranks_in_words, size_of
from .sockets import CATEGORY

FAMILIES = {"sdxl": SDXL, "flux": FLUX, "sd1": SD15}


class LoraWorkbenchExtractLora(io.ComfyNode):
    """Writes what turns one model into another as a LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        files = [NONE, *model_file_names()]
        return io.Schema(
            node_id="LoraWorkbenchExtractLora",
            display_name="Extract LoRA",
            category=CATEGORY,
            description="Makes a LoRA of the difference between two models: a fine-tune, a merge, or a model with "
            "LoRAs on.",
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model", optional=True, tooltip="The model to make a LoRA of, with whatever is patched onto it."
                ),
                io.Model.Input("model_base", optional=True, tooltip="The model that the LoRA will be put on."),
                io.Clip.Input("clip", optional=True, tooltip="The CLIP of model, if the LoRA is to change text too."),
                io.Clip.Input("clip_base", optional=True, tooltip="The CLIP that the LoRA will be put on."),
                io.Combo.Input(
                    "file", options=files, tooltip="Instead of model and clip: a file, read without being loaded."
                ),
                io.Combo.Input(
                    "file_base", options=files, tooltip="Instead of model_base and clip_base: the file of the base."
                ),
                name_input("extracted"),
                io.Int.Input(
                    "rank",
                    default=32,
                    min=1,
                    max=1024,
                    tooltip="The highest rank a layer may have. 32 to 128 is usual.",
                ),
                io.Float.Input(
                    "energy",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1 each layer gets the lowest rank that keeps this share of its squared difference.",
                ),
                precision_input("fp16"),
            ],
            outputs=file_outputs(),
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, file=NONE, file_base=NONE, name=None) -> bool | str:
        """A file that is gone, or a name that no file can have, is an error before anything runs."""
        try:
            for model_file in (file, file_base):
                if not is_none(model_file):
                    model_file_path(model_file)
        except ValueError as error:
            return str(error)
        return name_problem(name)

    @classmethod
    def fingerprint_inputs(cls, file=NONE, file_base=NONE, **_) -> list:
        """Another file of the same name is another input, and so is a LoRA that this node wrote and that is gone."""
        # ComfyUI writes it into pictures: nobody need read there where the files lie.
        facts = [(each, model_file_path(each).stat()) for each in (file, file_base) if not is_none(each)]
        return [*((each, one.st_size, one.st_mtime_ns) for each, one in facts), times_lost(cls.hidden.unique_id)]

    @classmethod
    def execute(
        cls,
        file,
        file_base,
        name,
        rank,
        energy,
        precision,
        model=None,
        model_base=None,
        clip=None,
        clip_base=None,
    ) -> io.NodeOutput:
        folders.new_lora_path(name)  # a name from a wire is looked at before the work too
        watch = partial(Progress(cls.hidden.unique_id).encoding, "comparing weights")
        pairs, of = compared(model, model_base, clip, clip_base, file, file_base, watch)
        result = extracted(pairs, rank, energy)
        told = entries(name, of, result, loras.model_family(model) if model else family_of(result.tensors))
        path, written = write_lora(
            name, result.tensors, told, PRECISIONS[precision] or result.precision, cls.hidden.unique_id
        )
        return file_output(written, report(f"'{written}' ({size_of(path)})", result), cls.hidden.unique_id)


def compared(model, model_base, clip, clip_base, file: str, file_base: str, watch) -> tuple[Iterator[Pair], str]:
    """The weights to compare, one pair at a time, and what they are of; ValueError for half a pair or none."""
    for one, other, names in (
        (model, model_base, "model and model_base"),
        (clip, clip_base, "clip and clip_base"),
        (None if is_none(file) else file, None if is_none(file_base) else file_base, "file and file_base"),
    ):
        if (one is None) != (other is None):
            raise ValueError(f"Only one of {names} is given: give both, or neither.")
    if not is_none(file) and (model is not None or clip is not None):
        raise ValueError("Both files and loaded models are given: set file and file_base to none, or connect no model.")
    if not is_none(file):
        return file_pairs(model_file_path(file), model_file_path(file_base), watch), f"{file} - {file_base}"
    if model is None and clip is None:
        raise ValueError("There is nothing to compare: connect model and model_base, or choose file and file_base.")
    of_model = model_pairs(model, model_base, watch) if model is not None else ()
    of_clip = clip_pairs(clip, clip_base, watch) if clip is not None else ()
    return chain(of_model, of_clip), "loaded models"


def entries(name: str, of: str, result: Extraction, family: str | None) -> dict[str, str]:
    """What the new file says about itself."""
    told = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.title": name,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(max(result.ranks.values())),
        "ss_network_alpha": "Dynamic",
        f"{OURS}extracted": of,
    }
    if family in FAMILIES:
        told["ss_base_model_version"] = FAMILIES[family].base_model_version
        told["modelspec.architecture"] = FAMILIES[family].architecture
    return told


def report(written: str, result: Extraction) -> str:
    """What was found, and how much of the difference is in the file."""
    ranks = ranks_in_words(list(result.ranks.values()))
    line = f"{written}: {len(result.ranks)} layers, {ranks}, keeps {percent(result.kept)} of the difference."
    return "\n".join([line, *result.notes])
