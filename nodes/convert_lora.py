"""The Convert LoRA node."""

from __future__ import annotations

from collections.abc import Mapping

from comfy_api.latest import io
from torch import Tensor

from ..lora_files.forms import COMFYUI, DIFFUSERS, FOLD, KEEP, KOHYA, converted, form_of
from ..lora_files.layers import ALPHA, layers_of
from ..training.config import LORA
from ..training.embeddings import layers_only
from .host import folders
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
from .lora_sources import chosen, lora_inputs, lora_problem, size_of, state_of
from .sockets import CATEGORY

FORMS = (KOHYA, DIFFUSERS, COMFYUI)


class LoraWorkbenchConvertLora(io.ComfyNode):
    """Writes a LoRA again under the names that other programs look for."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraWorkbenchConvertLora",
            display_name="Convert LoRA",
            category=CATEGORY,
            description="Writes a LoRA in the form of another program: kohya, diffusers or ComfyUI.",
            is_output_node=True,
            inputs=[
                *lora_inputs("The LoRA to convert. It stays as it is."),
                name_input("converted"),
                io.Combo.Input(
                    "form",
                    options=list(FORMS),
                    tooltip="Whose names the layers get. kohya: read by nearly every program. diffusers: by diffusers, "
                    "and by ComfyUI too. comfyui: the model's own names. ComfyUI loads all three alike.",
                ),
                io.Combo.Input(
                    "alpha",
                    options=[KEEP, FOLD],
                    tooltip="keep: alpha stays a value of its own, and converting back gives the same tensors. fold: "
                    "it is multiplied in and gone, for programs that do not read it, such as diffusers with SDXL.",
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
    def fingerprint_inputs(cls, lora=NONE, lora_name=None, **_) -> list:
        """Another file of the same name is another input, and so is one that this node wrote and that is gone."""
        return [*state_of([lora_name or lora]), times_lost(cls.hidden.unique_id)]

    @classmethod
    def execute(cls, lora, name, form, alpha, precision, lora_name=None) -> io.NodeOutput:
        folders.new_lora_path(name)  # a name from a wire is looked at before the work too
        file, dtype = chosen(lora, lora_name), PRECISIONS[precision]
        tensors = file.tensors
        if alpha == FOLD and dtype is not None:
            # Rounded once, after the product.
            tensors = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
        result = converted(tensors, form, alpha)
        path, written = write_lora(name, result, told(file.entries, alpha), dtype, cls.hidden.unique_id)
        before, after = len(layers_of(tensors)), len(layers_of(result))
        lines = [
            f"'{file.path.name}' ({form_of(layers_only(tensors)) or 'mixed forms'}) -> '{written}' ({form}), "
            f"{size_of(path)}",
            f"{before:,} layers" if before == after else f"{before:,} layers in the file, {after:,} in the new one",
            *remarks(result, form),
        ]
        return file_output(written, "\n".join(lines), cls.hidden.unique_id)


def told(entries: Mapping[str, str], alpha: str) -> dict[str, str]:
    """What the new file says of itself: all that the old one did, and an alpha that is gone equals the rank."""
    if alpha == FOLD and "ss_network_dim" in entries:
        return {**entries, "ss_network_alpha": entries["ss_network_dim"]}
    return dict(entries)


def remarks(tensors: Mapping[str, Tensor], form: str) -> list[str]:
    """What diffusers will not read of a file in its form, though ComfyUI does."""
    if form != DIFFUSERS:
        return []
    layers = layers_of(tensors)
    others = sorted({layer.kind for layer in layers.values() if layer.kind != LORA})
    lines = [f"diffusers reads plain LoRA layers only; this file has {', '.join(others)} too."] if others else []
    if any(ALPHA in layer.parts and not name.startswith("transformer.") for name, layer in layers.items()):
        lines.append("diffusers reads alpha of FLUX layers only: for use there, choose alpha 'fold'.")
    return lines
