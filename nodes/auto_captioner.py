"""The LoRA Auto-Captioner node."""

from __future__ import annotations

from contextlib import closing

from comfy_api.latest import io

from ..captioning.caption_file import read_caption
from ..captioning.captioner import KEPT, WRITTEN, Captioner, Told, caption_folder, summary
from ..captioning.hinted import Hinted
from ..captioning.later import Later
from ..captioning.server import ServerCaptioner
from ..captioning.style import GENERAL, SENTENCES
from ..captioning.vision_language import VisionLanguageCaptioner
from ..training.dataset import Dataset, with_captions
from ..training.masks import shown
from . import captioner_inputs
from .caption_requests import requests_for
from .captioner_inputs import AUTOMATIC, CONNECTED_CLIP, FILE_NAME, LOCAL_MODEL, NO_MODEL, SERVER, Choices
from .host import caption_models, captions
from .host.identity import identity_of
from .host.progress import Progress, throw_if_cancelled
from .host.text_encoders import style_for
from .sockets import CATEGORY, DATASET


class LoraWorkbenchAutoCaptioner(io.ComfyNode):
    """Writes caption files beside pictures, and changes one that exists only when it is told to."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraWorkbenchAutoCaptioner",
            display_name="LoRA Auto-Captioner",
            category=CATEGORY,
            description="Writes a .txt beside every picture without a caption. Yours are only changed if you say so.",
            inputs=captioner_inputs.inputs([*caption_models.names(), *caption_models.offered()]),
            outputs=[
                DATASET.Output("dataset", tooltip="The same pictures, with the new captions."),
                io.String.Output("report", tooltip="How many captions were written, kept and failed, and why."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset: Dataset, clip=None, base_clip=None, **widgets) -> io.NodeOutput:
        choices = Choices(**widgets)
        style = style_for(base_clip) if choices.style == AUTOMATIC else choices.style
        writer = captioner_for(choices, clip)
        requests = requests_for(dataset, choices, style, source_of(choices, clip))
        progress, reports = Progress(cls.hidden.unique_id), []
        examples = {example.path: example for example in (*dataset.examples, *dataset.held_out)}
        progress.phase(" ".join([f"Captioning {len(requests)} pictures.", *remarks(choices, writer, style)]))
        run = caption_folder(
            requests,
            writer,
            choices.mode,
            request=requests.__getitem__,
            open_image=lambda path: shown(examples[path], dataset.background),
        )
        with closing(run):
            for report in run:
                reports.append(report)
                progress.phase(f"Captioned {len(reports)} of {len(requests)}")
                progress.update(len(reports), len(requests))
                throw_if_cancelled()
        # As they are in the end: two pictures whose names differ only in the ending share one caption file.
        there = [report.path for report in reports if report.outcome in (WRITTEN, KEPT) and read_caption(report.path)]
        report = "\n".join([summary(reports), *remarks(choices, writer, style)])
        return io.NodeOutput(with_captions(dataset, {path: read_caption(path) for path in there}), report)


def captioner_for(choices: Choices, clip) -> Captioner:
    """The captioner of these choices, with hints if wanted; ValueError in one sentence when it cannot work."""
    if choices.captioner == FILE_NAME:
        return Told(without_words="its name has no words")
    if choices.captioner not in MODELS:
        return Told(without_words="there is no trigger word: give one in LoRA Dataset Loader")
    captioner = MODELS[choices.captioner](choices, clip)
    if choices.hints == NO_MODEL:
        return captioner
    return Hinted(captioner, _later(choices.hints, choices))


def _connected(choices: Choices, clip) -> Captioner:
    if clip is None:
        raise ValueError(
            "captioner is 'connected clip', but no clip is connected: connect a vision-language model from Load "
            "CLIP, or choose 'trigger word only'."
        )
    return VisionLanguageCaptioner(captions.generator_of(clip))


def _local(choices: Choices, clip) -> Captioner:
    if choices.local_model == NO_MODEL:
        raise ValueError(
            f"captioner is 'local model', but local_model is 'none': choose one, or copy its folder into "
            f"{caption_models.models_folder()} and press R."
        )
    return _later(choices.local_model, choices)


def _later(model: str, choices: Choices) -> Captioner:
    return Later(lambda: caption_models.opened(model, fetch_missing=choices.allow_download))


def _server(choices: Choices, clip) -> Captioner:
    return caption_models.server(choices.server_address, choices.server_model, choices.key_variable)


MODELS = {CONNECTED_CLIP: _connected, LOCAL_MODEL: _local, SERVER: _server}


def source_of(choices: Choices, clip) -> str:
    """Which model these choices ask, so that another one is asked again."""
    model = {
        CONNECTED_CLIP: lambda: identity_of(clip.patcher),
        LOCAL_MODEL: lambda: choices.local_model,
        SERVER: lambda: f"{choices.server_address} {choices.server_model}",
    }.get(choices.captioner, str)
    return f"{model()} {choices.hints}"


def remarks(choices: Choices, captioner: Captioner, style: str) -> list[str]:
    """What the user should know about this captioner."""
    said = [captioner.notice] if isinstance(captioner, ServerCaptioner) and captioner.notice else []
    if captioner.writes_tags and style == SENTENCES:
        said.append("This model writes tags, though sentences were asked for or suit the base model.")
    if choices.captioner == LOCAL_MODEL and not captioner.follows_instructions and choices.purpose != GENERAL:
        said.append("This model cannot be told what to leave out: purpose has no effect on what it says.")
    return said
