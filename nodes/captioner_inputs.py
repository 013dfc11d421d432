"""The inputs of the LoRA Auto-Captioner node."""

from __future__ import annotations

from dataclasses import dataclass

from comfy_api.latest import io

from ..captioning.captioner import MODES
from ..captioning.exclusion import Exclusion
from ..captioning.finish import Finish
from ..captioning.replacement import Replacements
from ..captioning.style import GENERAL, PURPOSES, STYLES
from .sockets import DATASET

TRIGGER_ONLY, CONNECTED_CLIP, FILE_NAME = "trigger word only", "connected clip", "file name"
LOCAL_MODEL, SERVER = "local model", "server"
CAPTIONERS = (TRIGGER_ONLY, CONNECTED_CLIP, FILE_NAME, LOCAL_MODEL, SERVER)
AUTOMATIC = "automatic"
NO_MODEL = "none"


@dataclass(frozen=True)
class Choices:
    """What the widgets say."""

    captioner: str
    style: str
    mode: str
    purpose: str = GENERAL
    class_word: str = ""
    prefix: str = ""
    suffix: str = ""
    exclude: str = ""
    replace: str = ""
    keep_first: str = ""
    most_words: int = 0
    instruction: str = ""
    local_model: str = NO_MODEL
    hints: str = NO_MODEL
    server_address: str = "http://localhost:11434/v1"
    server_model: str = ""
    key_variable: str = ""
    allow_download: bool = False

    def finish(self, style: str) -> Finish:
        """How the captions are to read; ValueError in one sentence where a list is not written as it must be."""
        return Finish(
            style,
            prefix=self.prefix,
            suffix=self.suffix,
            replace=Replacements.parse(self.replace),
            exclude=Exclusion.parse(self.exclude),
            keep_first=self.keep_first,
            most_words=self.most_words,
        )


FIRST = [
    DATASET.Input("dataset", tooltip="Pictures from LoRA Dataset Loader."),
    io.Combo.Input(
        "captioner",
        options=list(CAPTIONERS),
        tooltip="Who writes: nobody but you, a connected CLIP that sees pictures, a model in models/LLM, or a server.",
    ),
    io.Combo.Input(
        "style",
        options=[AUTOMATIC, *STYLES],
        tooltip="Tags suit SD 1.5 and SDXL, sentences all others. automatic asks base_clip, or writes sentences.",
    ),
    io.Combo.Input(
        "mode",
        options=list(MODES),
        tooltip="only missing leaves every caption alone. replace automatic leaves yours. A backup is always kept.",
    ),
    io.Clip.Input(
        "clip",
        optional=True,
        tooltip="A vision-language model from Load CLIP, for 'connected clip'. Not the image model's CLIP.",
    ),
]

# Optional, so that graphs saved before they were there still run.
ASKING = [
    io.Combo.Input(
        "purpose",
        options=list(PURPOSES),
        default=Choices.purpose,
        optional=True,
        tooltip="What the LoRA is for. What its trigger word is to stand for is then left out of the captions.",
    ),
    io.String.Input(
        "class_word",
        default=Choices.class_word,
        optional=True,
        tooltip="What it is, such as woman or mug: 'a woman' becomes 'ohwx woman'. A kohya folder name is used too.",
    ),
]

READING = [
    io.String.Input(
        "prefix",
        default=Choices.prefix,
        optional=True,
        tooltip="Put before every caption; tags after the trigger word.",
    ),
    io.String.Input("suffix", default=Choices.suffix, optional=True, tooltip="Put after every caption."),
    io.String.Input(
        "exclude",
        default=Choices.exclude,
        multiline=True,
        optional=True,
        tooltip="Tags to leave out, and words whose sentences are: watermark*, solo. A line /.../ is an expression.",
    ),
    io.String.Input(
        "replace",
        default=Choices.replace,
        multiline=True,
        optional=True,
        advanced=True,
        tooltip="One pair a line: grey => gray. Whole words, and tags as a whole.",
    ),
    io.String.Input(
        "keep_first",
        default=Choices.keep_first,
        optional=True,
        advanced=True,
        tooltip="Tags that come first where they are found: 1girl, solo.",
    ),
    io.Int.Input(
        "most_words",
        default=Choices.most_words,
        min=0,
        max=1000,
        optional=True,
        advanced=True,
        tooltip="Captions are cut to whole sentences or tags of so many words. 0 = no limit.",
    ),
    io.String.Input(
        "instruction",
        default=Choices.instruction,
        multiline=True,
        optional=True,
        advanced=True,
        tooltip="What to ask the model, in your own words. Empty = by style, purpose and class_word.",
    ),
    io.Clip.Input(
        "base_clip",
        optional=True,
        tooltip="The CLIP of the model that you train, from which 'automatic' tells the style.",
    ),
]

SERVING = [
    io.String.Input(
        "server_address",
        default=Choices.server_address,
        optional=True,
        advanced=True,
        tooltip="For 'server': any address that speaks OpenAI's language. The default is Ollama on this machine.",
    ),
    io.String.Input(
        "server_model",
        default=Choices.server_model,
        optional=True,
        advanced=True,
        tooltip="For 'server': the name of the model there, such as qwen3-vl.",
    ),
    io.String.Input(
        "key_variable",
        default=Choices.key_variable,
        optional=True,
        advanced=True,
        tooltip="For 'server': NAME of the environment variable with the key, such as OPENAI_API_KEY, never the key.",
    ),
]


def inputs(models: list[str]) -> list[io.Input]:
    """All inputs; `models` are the local caption models to choose from."""
    return [*FIRST, *ASKING, *READING, *_local(models), *SERVING]


def _local(models: list[str]) -> list[io.Input]:
    return [
        io.Combo.Input(
            "local_model",
            options=[NO_MODEL, *models],
            default=Choices.local_model,
            optional=True,
            tooltip="For 'local model': a folder in models/LLM, or one to download, with its licence and size.",
        ),
        io.Combo.Input(
            "hints",
            options=[NO_MODEL, *models],
            default=Choices.hints,
            optional=True,
            advanced=True,
            tooltip="A tagger whose tags are told to the model that is asked, as it knows more names.",
        ),
        io.Boolean.Input(
            "allow_download",
            default=Choices.allow_download,
            optional=True,
            tooltip="Fetch the chosen model from huggingface.co if it is not there. Off: nothing is ever downloaded.",
        ),
    ]
