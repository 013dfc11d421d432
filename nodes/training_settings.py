"""The LoRA Training Settings node: every expert knob, each with a default that works."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from comfy_api.latest import io

from ..training import config
from ..training.families import LAYER_PRESETS
from ..training.presets import CHECKPOINTING, PRECISIONS, ExpertSettings
from ..training.schedule import SCHEDULES
from .sockets import CATEGORY, SETTINGS


class LoraWorkbenchTrainingSettings(io.ComfyNode):
    """Collects the expert settings of a training."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoraWorkbenchTrainingSettings",
            display_name="LoRA Training Settings",
            category=CATEGORY,
            description="Expert settings for LoRA Trainer. Every default is what the Trainer uses without this node.",
            # Saved workflows know widgets by their place, so new ones go to the end. Those that came later than
            # `_basics` are optional, so that older workflows in API form, which lack them, still run.
            inputs=[
                *_basics(),
                *_adapters(),
                *_learning(),
                *_noise_levels(),
                *_losses(),
                *_intervals(),
                *_memory(),
                *_forms(),
                *_outside(),
            ],
            outputs=[SETTINGS.Output("settings", tooltip="For the settings input of LoRA Trainer.")],
        )

    @classmethod
    def execute(cls, **settings) -> io.NodeOutput:
        return io.NodeOutput(ExpertSettings(**settings))


FIRST = tuple(field.name for field in fields(ExpertSettings))[:10]
"""The settings the node began with, which every saved workflow has."""


def _common(name: str, tooltip: str, advanced: bool = True) -> dict[str, Any]:
    default = getattr(ExpertSettings, name)
    return {"default": default, "advanced": advanced, "tooltip": tooltip, "optional": name not in FIRST}


def _choice(name: str, options: tuple[str, ...], tooltip: str, advanced: bool = True) -> io.Input:
    return io.Combo.Input(name, options=list(options), **_common(name, tooltip, advanced))


def _number(name: str, low: float, high: float, tooltip: str, step: float = 0.01, advanced: bool = True) -> io.Input:
    """A whole number where the default is one."""
    common = _common(name, tooltip, advanced)
    if isinstance(common["default"], int):
        return io.Int.Input(name, min=low, max=high, **common)
    return io.Float.Input(name, min=low, max=high, step=step, round=False, **common)


def _switch(name: str, tooltip: str) -> io.Input:
    return io.Boolean.Input(name, **_common(name, tooltip))


def _lines(name: str, tooltip: str) -> io.Input:
    return io.String.Input(name, multiline=True, **_common(name, tooltip))


def _basics() -> list[io.Input]:
    return [
        _choice("layers", LAYER_PRESETS, "Which layers of the model are adapted.", advanced=False),
        _number(
            "alpha",
            0.0,
            1024.0,
            "The LoRA's scale is alpha / rank. 0 = the same as rank, a scale of 1. Of kind oft a limit, 0 = none.",
            step=0.1,
            advanced=False,
        ),
        _number(
            "batch_size",
            1,
            256,
            "Pictures a step learns from at once. More is steadier and takes more memory.",
            advanced=False,
        ),
        _number(
            "accumulation",
            1,
            1024,
            "Batches averaged into one step: like a larger batch, but slower instead of larger.",
            advanced=False,
        ),
        _choice(
            "schedule",
            SCHEDULES,
            "How the learning rate goes over the run. constant can be extended with more steps (with a warmup of whole "
            "steps); the others fall to 0.",
            advanced=False,
        ),
        _number(
            "warmup",
            0.0,
            1_000_000.0,
            "Steps over which the learning rate rises; below 1 a share of all steps (0.05 = 5 %). 0 is usual.",
            advanced=False,
        ),
        _choice(
            "checkpointing",
            CHECKPOINTING,
            "Recompute blocks in backward: far less memory, half as long again. automatic: only when it must.",
            advanced=False,
        ),
        _number(
            "weight_decay",
            -1.0,
            10.0,
            "How strongly the LoRA is pulled towards zero. 0.01 is usual, -1 = that, and 4 for kind oft.",
            step=0.001,
        ),
        _number("clip_norm", 0.0, 1000.0, "The largest total gradient a step may have. 0 = no limit.", step=0.1),
        _choice("save_precision", PRECISIONS, "Number format of the file. fp16 is half of fp32 and looks the same."),
    ]


def _adapters() -> list[io.Input]:
    return [
        _choice(
            "kind",
            config.KINDS,
            "How layers are changed. lora suits most; dora learns like full training and is slower; loha, lokr and oft "
            "are other forms that ComfyUI loads as well.",
            advanced=False,
        ),
        _choice(
            "optimizer",
            config.OPTIMIZERS,
            "How steps are taken. adamw suits most; prodigy finds the learning rate, schedule-free needs no schedule; "
            "8-bit and adafactor take less memory. Some need a Python package, which they name.",
            advanced=False,
        ),
        _number(
            "text_encoder_rate",
            0.0,
            10.0,
            "Trains the CLIP text encoders too, at this share of the learning rate. 0.5 is usual, 0 = off.",
            step=0.05,
            advanced=False,
        ),
        _number("text_encoder_stop", 0.0, 1.0, "The share of the run after which the text encoders stay as they are."),
        _number("new_tokens", 0, 32, "A new word for each trigger word, of that many tokens. 2 is usual, 0 = off."),
        _number(
            "token_rate", 0.0, 1000.0, "How fast new words are learnt, as a factor on the learning rate.", step=0.5
        ),
        _switch("rank_stabilized", "Scale by alpha / sqrt(rank), so that high ranks learn as fast as low ones."),
        _number(
            "conv_rank",
            0,
            1024,
            "Rank of adapters on 3 x 3 convolutions, for styles. 0 = off. FLUX and SD 3 have none.",
        ),
        _lines("include", "Patterns (regular expressions), one a line: layers to adapt beside those of layers."),
        _lines("exclude", "Patterns, one a line: layers to leave alone."),
        _lines("ranks", "pattern = rank, one a line: layers with a rank of their own. 0 leaves a layer alone."),
        _lines("rates", "pattern = factor, one a line: layers that learn faster (2) or slower (0.5)."),
        _number("dropout", 0.0, 0.95, "The share of adapter inputs left out at random, against learning by heart."),
        _number("max_norm", 0.0, 1e6, "The largest change a layer may have; 1 is usual for kohya's option. 0 = none."),
    ]


def _learning() -> list[io.Input]:
    return [
        _number("restarts", 1, 1000, "How many cosines, for schedule cosine with restarts."),
        _number(
            "lora_plus", 0.01, 1000.0, "LoRA+: how much faster the up factors learn. 1 = off, 4 to 16 is usual.", 0.5
        ),
        _number(
            "ema",
            0.0,
            0.99999,
            "Also save a running average of the LoRA, with this decay. 0.99 to 0.999 is usual, 0 = none.",
            step=0.001,
        ),
        _number("average_last", 0, 100, "Also save the mean of that many last checkpoints. 3 to 5 is usual, 0 = none."),
    ]


def _noise_levels() -> list[io.Input]:
    return [
        _choice("timesteps", config.TIMESTEPS, "Which noise levels are trained. automatic: as the model was."),
        _number(
            "timestep_shift", 0.01, 100.0, "Of timesteps shift: above 1 moves towards noise. 3 is usual.", step=0.1
        ),
        _number("timestep_mean", -10.0, 10.0, "Of timesteps logit-normal: above 0 moves towards noise.", step=0.1),
        _number("timestep_std", 0.01, 10.0, "Of timesteps logit-normal: how wide it is. 1 is usual.", step=0.1),
        _number("timestep_low", 0.0, 1.0, "The lowest noise that is trained: 0 = a clean picture."),
        _number("timestep_high", 0.0, 1.0, "The highest noise that is trained: 1 = pure noise."),
        _number(
            "stratify",
            0,
            10_000,
            "Spread that many noise levels in a row evenly: a calmer loss with the same mean. 16 is usual, 0 = off.",
        ),
    ]


def _losses() -> list[io.Input]:
    return [
        _choice("loss", config.LOSSES, "How errors count. huber and smooth l1 forgive odd pictures more than l2."),
        _number("huber_c", 0.0001, 10.0, "Where huber and smooth l1 turn from square to straight."),
        _choice("huber_schedule", config.HUBER_SCHEDULES, "How huber_c follows the noise level."),
        _number("min_snr_gamma", 0.0, 100.0, "min-SNR: count low noise less. 5 is usual, 0 = off.", step=0.5),
        _switch("debiased", "Debiased estimation: count high noise more."),
        _number("noise_offset", 0.0, 1.0, "Learn very dark and bright pictures. 0.05 is usual, 0 = off."),
        _number("multires_iterations", 0, 16, "Noise of several sizes: its number. 6 is usual, 0 = off."),
        _number("multires_discount", 0.0, 1.0, "Noise of several sizes: how much each larger one counts."),
        _number("input_perturbation", 0.0, 1.0, "Extra noise on the input against learning by heart. 0.1, or 0 = off."),
        _number("mask_floor", 0.0, 1.0, "What the outside of a mask counts, where pictures have one. 0 = nothing."),
        _number(
            "preservation",
            0.0,
            100.0,
            "Keep the class as the model knows it, without extra pictures: weight of that. 1 is usual, 0 = off.",
            step=0.1,
        ),
        io.String.Input(
            "class_words",
            **_common(
                "class_words",
                "Of preservation and new_tokens: what the trigger words are, such as woman, for all concepts alike. "
                "Empty = as the folders say.",
            ),
        ),
    ]


def _intervals() -> list[io.Input]:
    return [
        _number("preview_every", 0, 1_000_000, "Steps between two previews. 0 = at every checkpoint."),
        _number("validate_every", 0, 1_000_000, "Steps between two tests on held-out pictures. 0 = at checkpoints."),
    ]


def _memory() -> list[io.Input]:
    return [
        _number("offload", -1.0, 1.0, "The share of the model streamed from main memory. -1 = automatic, 0 = none."),
    ]


def _forms() -> list[io.Input]:
    return [
        _number(
            "lokr_factor",
            -1,
            config.HIGHEST_RANK,
            "Of kind lokr: parts each side is divided into; fewer make a larger file that learns more. 8 and 16 are "
            "usual, 0 = no larger than a LoRA of the rank, -1 = the smallest.",
        ),
    ]


def _outside() -> list[io.Input]:
    return [
        _number(
            "mask_preservation",
            0.0,
            100.0,
            "Keep what lies outside masks as the model would draw it: weight of that. 1 is usual, 0 = off.",
            step=0.1,
        ),
    ]
