"""The LoRA Checkpoint Picker node."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io, ui
from PIL import Image

from ..training import picking
from ..training.figures import labelled_grid
from ..training.run import Checkpoint, Checkpoints, Validation
from .host import loras
from .host.architecture import family_of
from .host.progress import Progress, throw_if_cancelled
from .host.sampling import SamplerSettings, encode_prompt, sample_picture
from .pictures import to_image, to_picture
from .previews import spread
from .sockets import CATEGORY, CHECKPOINTS, STACK

MOST_COLUMNS = 6


class LoraWorkbenchCheckpointPicker(io.ComfyNode):
    """Chooses a checkpoint, says why, and shows what each one draws."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraWorkbenchCheckpointPicker",
            display_name="LoRA Checkpoint Picker",
            category=CATEGORY,
            description=(
                "Chooses the checkpoint that is best on pictures kept out of training, "
                "and hands it on in the same queue."
            ),
            inputs=[
                CHECKPOINTS.Input("checkpoints", tooltip="The checkpoints of a run, from LoRA Trainer."),
                io.Model.Input("model", tooltip="The model to put the chosen LoRA on: the same one the Trainer took."),
                io.Clip.Input("clip", tooltip="The CLIP that belongs to the model."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model, for the grid."),
                io.Combo.Input(
                    "pick",
                    options=list(picking.PICKS),
                    tooltip=(
                        "suggested: lowest loss on the pictures kept out of training. last: the end of the training. "
                        "at step: the one you name in at_step."
                    ),
                ),
                io.Int.Input(
                    "at_step", default=0, min=0, max=1_000_000, tooltip="The step to pick when pick is 'at step'."
                ),
                io.Combo.Input(
                    "preference",
                    options=list(picking.PREFERENCES),
                    tooltip=(
                        "Among equally good ones: balanced takes the lowest loss, flexible the earliest, "
                        "likeness the latest."
                    ),
                ),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    tooltip="One prompt a line, drawn with the checkpoints side by side. Empty draws nothing.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Seed of every picture in the grid.",
                ),
                io.Int.Input(
                    "size", default=1024, min=64, max=4096, step=8, tooltip="Width and height of the grid's pictures."
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with the chosen LoRA on, at strength 1."),
                io.Clip.Output("clip", tooltip="The CLIP with the chosen LoRA on."),
                STACK.Output("lora_stack", tooltip="The chosen LoRA as a stack."),
                io.String.Output("lora_name", tooltip="The chosen file's name, as Load LoRA lists it."),
                io.Int.Output("step", tooltip="The step of the chosen checkpoint."),
                io.Image.Output("grid", tooltip="Every checkpoint on every prompt, the untrained model first."),
                io.String.Output("report", tooltip="Which checkpoint was chosen, and why."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, checkpoints, model, clip, vae, pick, at_step, preference, prompts, seed, size) -> io.NodeOutput:
        choice = picking.choose(checkpoints, pick, at_step, preference)
        chosen = choice.checkpoint
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        grid = to_image(picture_grid(checkpoints, model, clip, vae, lines, seed, size, Progress(cls.hidden.unique_id)))
        picked_model, picked_clip = loras.apply(model, clip, loras.read_lora(Path(chosen.path)), 1.0, 1.0)
        return io.NodeOutput(
            picked_model,
            picked_clip,
            [(chosen.lora_name, 1.0, 1.0)],
            chosen.lora_name,
            chosen.step,
            grid,
            f"{choice.reason}\n{score_table(checkpoints)}",
            ui=ui.PreviewImage(grid, cls=cls) if lines else None,
        )


def picture_grid(
    checkpoints: Checkpoints, model, clip, vae, prompts: list[str], seed: int, size: int, progress: Progress
) -> Image.Image:
    """The prompts drawn by the untrained model and by up to five checkpoints, each as KSampler would draw it."""
    if not prompts:
        return Image.new("RGB", (64, 64), "white")
    family = family_of(model)
    settings = SamplerSettings(size // 8 * 8, size // 8 * 8, seed, family.cfg, family.sampler, family.scheduler)
    progress.phase("Encoding the prompts")
    untrained = [encode_prompt(clip, prompt) for prompt in (*prompts, "")]
    shown = spread(checkpoints.entries, MOST_COLUMNS - 1)
    rows: list[list[Image.Image]] = [[] for _ in prompts]
    for number, entry in enumerate([None, *shown]):
        progress.phase(f"Drawing column {number + 1} of {len(shown) + 1}")
        adapted, conditioning = (model, untrained) if entry is None else _with(entry, model, clip, prompts, untrained)
        for row, positive in zip(rows, conditioning[:-1], strict=True):
            throw_if_cancelled()
            row.append(to_picture(sample_picture(adapted, vae, positive, conditioning[-1], settings)))
        progress.update(number + 1, len(shown) + 1)
    return labelled_grid(rows, ["untrained", *(f"step {entry.step}" for entry in shown)], prompts)


def _with(entry: Checkpoint, model, clip, prompts: list[str], untrained: list) -> tuple[object, list]:
    """The MODEL with the checkpoint on, and the conditioning of the prompts and of none as its CLIP gives it."""
    lora = loras.read_lora(Path(entry.path))
    adapted, adapted_clip = loras.apply(model, clip, lora, 1.0, 1.0)
    said = loras.text_with(lora, entry.lora_name, prompts)
    return adapted, untrained if said is None else [encode_prompt(adapted_clip, prompt) for prompt in (*said, "")]


def score_table(checkpoints: Checkpoints) -> str:
    """Every checkpoint with its training loss and, where measured, its gain over the base on the held-out pictures."""
    measured, base = picking.scored(checkpoints), checkpoints.base_validation
    return "\n".join(_score_line(entry, base, entry in measured) for entry in checkpoints.entries)


def _score_line(entry: Checkpoint, base: Validation | None, measured: bool) -> str:
    loss = "" if entry.loss is None else f", training loss {entry.loss:.4f}"
    if not measured:
        return f"step {entry.step}{loss}"
    percent = picking.percent_better(entry, base)
    direction = "better" if percent >= 0 else "worse"
    return f"step {entry.step}{loss}, held-out pictures {abs(percent):.1f} % {direction} than the base"
