"""The LoRA Regularization Images node."""

from __future__ import annotations

import hashlib

import torch
from comfy_api.latest import io, ui

from ..training.images import open_image
from .class_pictures import ClassPictures
from .host import folders
from .host.architecture import family_of
from .host.progress import Progress
from .host.sampling import PREVIEW_STEPS, SamplerSettings, sampler_names, scheduler_names
from .pictures import to_image
from .sockets import CATEGORY, DATASET

AUTOMATIC = "automatic"
MOST_SHOWN = 16


class LoraWorkbenchRegularizationImages(io.ComfyNode):
    """Lets the base model draw its own idea of a class, so that training can keep the class as it was."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraWorkbenchRegularizationImages",
            display_name="LoRA Regularization Images",
            category=CATEGORY,
            description="Makes pictures of a class with the base model, once, as a dataset that keeps the class.",
            inputs=[
                io.Model.Input("model", tooltip="The model that you train: it draws what it takes the class to be."),
                io.Clip.Input("clip", tooltip="The CLIP of that model."),
                io.Vae.Input("vae", tooltip="The VAE of that model."),
                io.String.Input(
                    "prompt",
                    default="a photo of a person",
                    multiline=True,
                    tooltip="The class in plain words, without the trigger word. It is also the caption.",
                ),
                io.Int.Input(
                    "count",
                    default=50,
                    min=1,
                    max=10000,
                    tooltip="How many pictures. More later only adds to those there are; fewer uses the first.",
                ),
                io.Int.Input("width", default=1024, min=64, max=4096, step=8, tooltip="Width in pixels."),
                io.Int.Input("height", default=1024, min=64, max=4096, step=8, tooltip="Height in pixels."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=False,
                    tooltip="The seed of the first picture; each further one has the next.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=0.01,
                    max=10.0,
                    step=0.05,
                    tooltip="How much they count in training: a factor on their loss.",
                ),
                io.Int.Input(
                    "steps", default=PREVIEW_STEPS, min=1, max=200, advanced=True, tooltip="Steps, as in KSampler."
                ),
                io.Float.Input(
                    "cfg",
                    default=0.0,
                    min=0.0,
                    max=30.0,
                    step=0.1,
                    advanced=True,
                    tooltip="CFG, as in KSampler. 0 = what suits the model.",
                ),
                io.Combo.Input(
                    "sampler",
                    options=[AUTOMATIC, *sampler_names()],
                    advanced=True,
                    tooltip="As in KSampler. automatic = what suits the model.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=[AUTOMATIC, *scheduler_names()],
                    advanced=True,
                    tooltip="As in KSampler. automatic = what suits the model.",
                ),
                io.String.Input(
                    "negative_prompt", default="", advanced=True, tooltip="What not to draw, where CFG is above 1."
                ),
            ],
            outputs=[
                DATASET.Output("dataset", tooltip="For the dataset input of LoRA Dataset Loader."),
                io.Image.Output("images", tooltip=f"The first {MOST_SHOWN} of them."),
                io.String.Output("report", tooltip="How many were made, how many were there, and where they are."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def fingerprint_inputs(cls, **_inputs) -> str:
        """Changes when pictures come, go or are edited, so that one that was deleted is made again."""
        state = folders.folder_state(folders.regularization_folder())
        return hashlib.sha256(repr(state).encode()).hexdigest()

    @classmethod
    def execute(cls, model, clip, vae, prompt, negative_prompt, count, weight, **sampling) -> io.NodeOutput:
        settings = settings_for(model, **sampling)
        one_line = (" ".join(text.split()) for text in (prompt, negative_prompt))
        pictures = ClassPictures(model, clip, vae, *one_line, settings)
        made = pictures.make(count, Progress(cls.hidden.unique_id))
        shown = torch.cat([to_image(open_image(path)) for path in pictures.paths(count)[:MOST_SHOWN]])
        report = (
            f"{count} pictures of '{pictures.prompt}': {made} made, {count - made} there already, in {pictures.folder}"
        )
        return io.NodeOutput(pictures.dataset(count, weight), shown, report, ui=ui.PreviewImage(shown, cls=cls))


def settings_for(model, *, width, height, seed, steps, cfg, sampler, scheduler) -> SamplerSettings:
    """The settings of the first picture, with what suits the model where they are automatic."""
    family = family_of(model) if not cfg or AUTOMATIC in (sampler, scheduler) else None
    return SamplerSettings(
        width // 8 * 8,
        height // 8 * 8,
        seed,
        cfg or family.cfg,
        family.sampler if sampler == AUTOMATIC else sampler,
        family.scheduler if scheduler == AUTOMATIC else scheduler,
        steps,
    )
