"""The LoRA Checkpoint Picker node."""

from __future__ import annotations

import math
from pathlib import Path

from comfy_api.latest import io, ui

from ..training import lora_series, picking
from ..training.checkpoint import Checkpoints
from ..training.scores import EFFORTS, STANDARD
from . import grid as grids
from . import selection
from .host import folders, loras
from .host.choice import Choice, times_asked_again
from .host.progress import Progress
from .pictures import to_image
from .sockets import CATEGORY, CHECKPOINTS, DATASET, STACK

NOTHING = "nothing"


class LoraWorkbenchCheckpointPicker(io.ComfyNode):
    """Chooses a checkpoint, says why, shows what each one draws, and hands the chosen one on."""

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
                CHECKPOINTS.Input(
                    "checkpoints",
                    optional=True,
                    tooltip="The checkpoints of a run, from LoRA Trainer. Without them choose a folder.",
                ),
                io.Model.Input("model", tooltip="The model to put the chosen LoRA on: the same one the Trainer took."),
                io.Clip.Input("clip", tooltip="The CLIP that belongs to the model."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.Combo.Input(
                    "pick",
                    options=list(picking.PICKS),
                    tooltip=(
                        "suggested: lowest loss on the pictures kept out of training. last: the end of the training. "
                        "at step: the one you name in at_step. ask me: the queue waits until you choose a picture."
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
                io.Combo.Input(
                    "folder",
                    options=[NOTHING, *lora_series.folders_with_loras(folders.loras_folder())],
                    optional=True,
                    tooltip=(
                        "A folder of LoRA files from any trainer, to choose from where no checkpoints are connected."
                    ),
                ),
                io.Combo.Input(
                    "effort",
                    options=list(EFFORTS),
                    default=STANDARD,
                    optional=True,
                    tooltip=(
                        "How many pictures each file is measured on: quick 2 held out and 2 trained, standard 4 and 4, "
                        "thorough 8 and 8. Standard costs about one picture's time a file."
                    ),
                ),
                io.Combo.Input(
                    "grid",
                    options=list(grids.SCOPES),
                    default=grids.SHORTLIST,
                    optional=True,
                    tooltip=(
                        "Which files are drawn: shortlist the untrained model, the pick, one earlier, one later and "
                        "the last; everything all of them; nothing none."
                    ),
                ),
                DATASET.Input(
                    "dataset",
                    optional=True,
                    tooltip=(
                        "More pictures to measure with, such as unused shots: what was not trained on counts as kept "
                        "out. Needed for a folder of files."
                    ),
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="Optional: measures likeness, copies and variety in the grid's pictures.",
                ),
                io.String.Input(
                    "strengths",
                    default="1",
                    optional=True,
                    advanced=True,
                    tooltip="Strengths at which the grid draws every file, separated by commas, such as 0.6, 0.8, 1.",
                ),
                io.Boolean.Input(
                    "find_strength",
                    default=True,
                    optional=True,
                    advanced=True,
                    tooltip="Measure the pick at five strengths, and write the best into the file as a recommendation.",
                ),
                io.Float.Input(
                    "ask_minutes",
                    default=0.0,
                    min=0.0,
                    max=100_000.0,
                    step=1.0,
                    optional=True,
                    advanced=True,
                    tooltip="How long 'ask me' waits before it takes the suggestion. 0 waits as long as you like.",
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with the chosen LoRA on, at strength 1."),
                io.Clip.Output("clip", tooltip="The CLIP with the chosen LoRA on."),
                STACK.Output("lora_stack", tooltip="The chosen LoRA as a stack."),
                io.String.Output("lora_name", tooltip="The chosen file's name, as Load LoRA lists it."),
                io.Int.Output("step", tooltip="The step of the chosen checkpoint."),
                io.Image.Output("grid", tooltip="The files on every prompt, the untrained model first."),
                io.String.Output("report", tooltip="Which checkpoint was chosen, and why."),
                io.Image.Output(
                    "scores", tooltip="How every file does on kept-out and on trained pictures, as charts."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, folder=NOTHING, **_inputs) -> str:
        """Changes when the user wants to be asked again, and when LoRA files of the chosen folder change."""
        asked = times_asked_again(getattr(cls.hidden, "unique_id", None))
        state = lora_series.state_of(folders.loras_folder() / folder) if _is_folder(folder) else []
        return repr((asked, state))

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        pick,
        at_step,
        preference,
        prompts,
        seed,
        size,
        checkpoints: Checkpoints | None = None,
        folder: str = NOTHING,
        effort: str = STANDARD,
        grid: str = grids.SHORTLIST,
        dataset=None,
        clip_vision=None,
        strengths: str = "1",
        find_strength: bool = True,
        ask_minutes: float = 0.0,
    ) -> io.NodeOutput:
        found = files_of(checkpoints, folder)
        request = selection.Request(
            model=model,
            clip=clip,
            vae=vae,
            checkpoints=found,
            pick=pick,
            at_step=at_step,
            preference=preference,
            prompts=tuple(line.strip() for line in prompts.splitlines() if line.strip()),
            seed=seed,
            size=size,
            dataset=dataset,
            clip_vision=clip_vision,
            effort=effort,
            scope=grid,
            strengths=numbers_of(strengths),
            finds_strength=find_strength,
            ask_minutes=ask_minutes,
        )
        with Choice(cls.hidden.unique_id, found.name, of_one_training=checkpoints is not None) as shown:
            picked = selection.execute(request, Progress(cls.hidden.unique_id, shown), shown)
        chosen = picked.checkpoint
        picked_model, picked_clip = loras.apply(model, clip, loras.read_lora(Path(chosen.path)), 1.0, 1.0)
        drawn = to_image(picked.grid.picture(mark=chosen))
        return io.NodeOutput(
            picked_model,
            picked_clip,
            [(chosen.lora_name, 1.0, 1.0)],
            chosen.lora_name,
            chosen.step,
            drawn,
            selection.report(picked),
            to_image(selection.charts(picked)),
            ui=ui.PreviewImage(drawn, cls=cls) if picked.grid.cells else None,
        )


def files_of(checkpoints: Checkpoints | None, folder: str) -> Checkpoints:
    """What to choose from: the connected checkpoints, else the LoRA files of a folder; ValueError without either."""
    if checkpoints is not None:
        return checkpoints
    if not _is_folder(folder):
        raise ValueError("There is nothing to choose from: connect 'checkpoints' of LoRA Trainer, or choose a folder.")
    return lora_series.series(folders.loras_folder() / folder, folders.loras_folder())


def numbers_of(text: str) -> tuple[float, ...]:
    """The strengths in a text, separated by commas; ValueError for what is no number."""
    try:
        numbers = tuple(float(part) for part in text.replace(";", ",").split(",") if part.strip())
    except ValueError:
        numbers = (math.nan,)
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"strengths is '{text}': give numbers separated by commas, such as 0.6, 0.8, 1.")
    return numbers or (1.0,)


def _is_folder(folder: object) -> bool:
    return isinstance(folder, str) and folder != NOTHING
