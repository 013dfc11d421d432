"""The LoRA Auto-Captioner node."""

from __future__ import annotations

from comfy_api.latest import io

from ..captioning.captioner import MODES, Captioner, Told, caption_folder, summary
from ..captioning.style import INSTRUCTIONS, SENTENCES, TAGS
from ..captioning.text import clean, clean_tags
from ..captioning.vision_language import VisionLanguageCaptioner
from ..training.dataset import Dataset, with_captions
from ..training.images import open_image
from .host import captions
from .host.progress import Progress, throw_if_cancelled
from .sockets import CATEGORY, DATASET

TRIGGER_ONLY, CONNECTED_CLIP = "trigger word only", "connected clip"
AUTOMATIC = "automatic"
CLEANERS = {SENTENCES: clean, TAGS: clean_tags}


class LoraWorkbenchAutoCaptioner(io.ComfyNode):
    """Writes a caption file beside every picture that has none, and never touches one that exists."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraWorkbenchAutoCaptioner",
            display_name="LoRA Auto-Captioner",
            category=CATEGORY,
            description="Writes a .txt beside every picture without a caption. Captions that exist are never changed.",
            inputs=[
                DATASET.Input("dataset", tooltip="Pictures from LoRA Dataset Loader."),
                io.Combo.Input(
                    "captioner",
                    options=[TRIGGER_ONLY, CONNECTED_CLIP],
                    tooltip="Who writes: the trigger word alone, or a connected CLIP that sees pictures (Qwen3-VL).",
                ),
                io.Combo.Input(
                    "style",
                    options=[AUTOMATIC, SENTENCES, TAGS],
                    tooltip="Sentences suit FLUX and SDXL, tags suit anime models. automatic writes sentences.",
                ),
                io.Combo.Input(
                    "mode", options=list(MODES), tooltip="only missing: pictures that have a caption are left alone."
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="A vision-language model from Load CLIP, for 'connected clip'. Not the image model's CLIP.",
                ),
            ],
            outputs=[
                DATASET.Output("dataset", tooltip="The same pictures, with the new captions."),
                io.String.Output("report", tooltip="How many captions were written, kept and failed, and why."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, dataset: Dataset, captioner: str, style: str, mode: str, clip=None) -> io.NodeOutput:
        writer = captioner_for(captioner, clip)
        style = SENTENCES if style == AUTOMATIC else style
        question = INSTRUCTIONS[style] if captioner == CONNECTED_CLIP else dataset.trigger_word
        paths = [example.path for example in (*dataset.examples, *dataset.held_out)]
        progress, reports = Progress(cls.hidden.unique_id), []
        progress.phase(f"Captioning {len(paths)} pictures")
        for report in caption_folder(
            paths,
            writer,
            mode,
            instruction=lambda path: question,
            finish=lambda path, answer: CLEANERS[style](answer),
            open_image=open_image,
        ):
            reports.append(report)
            progress.phase(f"Captioned {len(reports)} of {len(paths)}")
            progress.update(len(reports), len(paths))
            throw_if_cancelled()
        known = {report.path: report.caption for report in reports if report.caption}
        return io.NodeOutput(with_captions(dataset, known), summary(reports))


def captioner_for(captioner: str, clip) -> Captioner:
    """The captioner of these settings; ValueError in one sentence when it cannot work."""
    if captioner == CONNECTED_CLIP:
        if clip is None:
            raise ValueError(
                "captioner is 'connected clip', but no clip is connected: connect a vision-language model from Load "
                "CLIP, or choose 'trigger word only'."
            )
        return VisionLanguageCaptioner(captions.generator_of(clip))
    return Told(without_words="there is no trigger word: give one in LoRA Dataset Loader")
