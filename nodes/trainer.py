"""The LoRA Trainer node."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io, ui
from safetensors import safe_open

from ..training import curve, picking
from ..training.checkpoint import Checkpoints
from ..training.embeddings import bundled_words, embedding_names, worded
from ..training.presets import PRESETS, ExpertSettings
from ..training.run_report import loss_picture
from . import job
from .host import folders, loras
from .host.graph import Graph
from .host.live import LiveRun, going_on, unfinished
from .host.progress import Progress
from .lora_sources import lora_problem, state_of
from .pictures import to_image
from .sockets import CATEGORY, CHECKPOINTS, DATASET, SETTINGS, STACK

CONTINUE, START_OVER = "continue", "start over"
NOTHING = "nothing"


class LoraWorkbenchTrainer(io.ComfyNode):
    """Trains a LoRA on the MODEL that is already loaded, in place, and leaves it as it was."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraWorkbenchTrainer",
            display_name="LoRA Trainer",
            category=CATEGORY,
            description=(
                "Trains a LoRA on the model that is already loaded in this graph. Cancel keeps the work; queue again "
                "to go on. The files are in models/loras/<name>."
            ),
            is_output_node=True,
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip=(
                        "The model to train on: SDXL, SD 1.5, SD 3, FLUX and other image models. "
                        "It is left exactly as it is."
                    ),
                ),
                io.Clip.Input("clip", tooltip="The text encoders that belong to the model. They read the captions."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model. It encodes the pictures."),
                DATASET.Input("dataset", tooltip="Pictures and captions from LoRA Dataset Loader."),
                io.String.Input(
                    "name", default="my_lora", tooltip="Name of the LoRA and of its folder in models/loras."
                ),
                io.Combo.Input(
                    "preset",
                    options=list(PRESETS),
                    tooltip="What the pictures teach. It decides steps and rank where they are 0.",
                ),
                io.Int.Input("steps", default=0, min=0, max=1_000_000, tooltip="Training steps. 0 = from the preset."),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=10.0,
                    step=1e-6,
                    round=False,
                    tooltip="How fast it learns, for example 0.0001. 0 = as suits optimizer, kind and batch.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=1024,
                    tooltip=(
                        "How much the LoRA can hold, and how large its file is. 16 suits one subject. "
                        "0 = from the preset."
                    ),
                ),
                io.Int.Input(
                    "save_every",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip="Steps between two checkpoints, each with previews. 0 = 8 to 18 of them, at round numbers.",
                ),
                io.String.Input(
                    "preview_prompts",
                    default="",
                    multiline=True,
                    tooltip=(
                        "One prompt a line, drawn before training and at every checkpoint. Empty = the first caption."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=False,
                    tooltip="Decides everything random: the same seed and inputs give the same file.",
                ),
                io.Combo.Input(
                    "resume",
                    options=[CONTINUE, START_OVER],
                    tooltip=(
                        "continue: go on where the same training stopped, or add steps. "
                        "start over: train anew beside it, from step 0, each time."
                    ),
                ),
                SETTINGS.Input("settings", optional=True, tooltip="Expert settings from LoRA Training Settings."),
                io.Float.Input(
                    "stop_after",
                    default=0.0,
                    min=0.0,
                    max=100_000.0,
                    step=1.0,
                    optional=True,
                    tooltip="Minutes from the first step on: steps and schedule are fitted to them. 0 = no limit.",
                ),
                io.Combo.Input(
                    "start_from",
                    options=[NOTHING, *folders.lora_names()],
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "A LoRA to begin with instead of nothing, from any trainer. Kinds lora and dora take any rank; "
                        "loha, lokr and oft begin as their own kind only."
                    ),
                ),
            ],
            outputs=[
                io.Model.Output("model", tooltip="The model with the trained LoRA on, at strength 1."),
                io.Clip.Output("clip", tooltip="The CLIP to use with it."),
                CHECKPOINTS.Output("checkpoints", tooltip="Every checkpoint of this run, for LoRA Checkpoint Picker."),
                STACK.Output("lora_stack", tooltip="The trained LoRA as a stack, for any stack node."),
                io.String.Output("lora_name", tooltip="The file's name, as text; Load LoRA takes no wire there."),
                io.Image.Output("previews", tooltip="The untrained model and up to ten checkpoints side by side."),
                io.Image.Output("loss_chart", tooltip="Loss by step."),
                io.String.Output("report", tooltip="What was trained, where the file is, and the proof that it loads."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def validate_inputs(cls, start_from=NOTHING) -> bool | str:
        """A LoRA to begin with that is gone is an error before anything runs."""
        return start_from == NOTHING or lora_problem(start_from)

    @classmethod
    def fingerprint_inputs(cls, name="", start_from=NOTHING, **_inputs) -> list:
        """Changes while there is something left to do, so that queueing the same graph again goes on.

        Another file to begin with, of the same name, is another training.
        """
        # A wired name is known only when the node runs, so it always does.
        left = unfinished(name) if isinstance(name, str) else float("nan")
        return [left, *([] if start_from in (None, NOTHING) else state_of([start_from]))]

    @classmethod
    def execute(
        cls,
        model,
        clip,
        vae,
        dataset,
        name,
        preset,
        steps,
        learning_rate,
        rank,
        save_every,
        preview_prompts,
        seed,
        resume,
        settings: ExpertSettings | None = None,
        stop_after: float = 0.0,
        start_from: str = NOTHING,
    ) -> io.NodeOutput:
        request = job.Request(
            model=model,
            clip=clip,
            vae=vae,
            dataset=dataset,
            name=name,
            preset=preset,
            steps=steps,
            learning_rate=learning_rate,
            rank=rank,
            save_every=save_every,
            preview_prompts=preview_prompts,
            seed=seed,
            start_over=resume == START_OVER,
            stop_after=stop_after,
            start_from="" if start_from == NOTHING else start_from,
            settings=settings or ExpertSettings(),
            graph=Graph.of(cls.hidden),
        )
        live = LiveRun(cls.hidden.unique_id, name, starts_over=request.start_over)
        progress = Progress(cls.hidden.unique_id, live)
        with live:
            result = job.execute(request, progress)
        checkpoints = replace(result.run.result(result.plan.train.steps, dataset.trigger_word), dataset=dataset)
        trained_model, trained_clip = loras.apply(model, clip, loras.read_lora(result.checkpoint.path), 1.0, 1.0)
        previews = to_image(result.previews)
        return io.NodeOutput(
            trained_model,
            trained_clip,
            checkpoints,
            [(result.checkpoint.lora_name, 1.0, 1.0)],
            result.checkpoint.lora_name,
            previews,
            to_image(loss_picture(result.run, f"{result.run.name}: loss by step")),
            report(result, checkpoints, going_on(request.start_over)),
            ui=ui.PreviewImage(previews, cls=cls),
        )


def report(result: job.Result, checkpoints: Checkpoints, to_go_on: str) -> str:
    """What happened, in lines a user can act on; `to_go_on` says how to train on what was finished early."""
    if result.trained:
        done = f"Trained {result.trained} step{'s' * (result.trained != 1)}, up to step {result.run.step}."
    else:
        done = f"Nothing to train: this run already is at step {result.run.step}."
    if result.checkpoint.step < min(result.run.step, result.plan.train.steps):
        done += f" The newest checkpoint within {result.plan.train.steps} steps is step {result.checkpoint.step}."
    elif result.run.step < result.plan.train.steps:
        done += f" Finished early: {result.plan.train.steps} steps were planned; {to_go_on}."
    with safe_open(result.checkpoint.path, framework="pt") as file:
        names = embedding_names(bundled_words(file.keys()), result.checkpoint.lora_name)
    lines = [
        f"LoRA '{result.run.name}'",
        done,
        f"Settings: {result.plan}",
        *([f"Memory: {memory}."] if (memory := result.run.fact("memory")) else []),
        *result.run.notes,
        curve.diagnose(result.run.curve()).sentence,
        *_verdict(checkpoints),
        f"Pictures: {_pictures(checkpoints.dataset)}.",
        f"File: {result.checkpoint.path}",
        f"File {result.proof}.",
        *(f"In prompts write {worded(word, names).strip()} where you mean {word}." for word in names),
        f"Report with pictures: {result.run.folder / 'report.html'}",
    ]
    if checkpoints.trigger_word:
        lines.insert(1, f"Trigger word: {checkpoints.trigger_word}")
    return "\n".join(lines)


def _verdict(checkpoints: Checkpoints) -> list[str]:
    """Which file the held-out pictures speak for, as in the report with pictures; nothing where none were asked."""
    if not picking.measured_of(checkpoints):
        return []
    return [picking.choose(checkpoints, picking.SUGGESTED, 0, picking.BALANCED).reason]


def _pictures(dataset) -> str:
    regularization = len(dataset.examples) - len(dataset.concepts)
    kept_apart = f", {regularization} for regularization" if regularization else ""
    return f"{len(dataset.concepts)} trained{kept_apart}, {len(dataset.held_out)} held out"
