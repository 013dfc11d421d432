"""The LoRA Training Settings node: every expert knob, each with a default that works."""

from __future__ import annotations

from comfy_api.latest import io

from ..training.families import LAYER_PRESETS
from ..training.presets import AUTOMATIC, OFF, ON, PRECISIONS, ExpertSettings
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
            inputs=[
                io.Combo.Input("layers", options=list(LAYER_PRESETS), tooltip="Which layers of the model are adapted."),
                io.Float.Input(
                    "alpha",
                    default=ExpertSettings.alpha,
                    min=0.0,
                    max=1024.0,
                    tooltip="The LoRA's scale is alpha / rank. 0 = the same as rank, a scale of 1.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=ExpertSettings.batch_size,
                    min=1,
                    max=256,
                    tooltip="Pictures a step learns from at once. More is steadier and takes more memory.",
                ),
                io.Int.Input(
                    "accumulation",
                    default=ExpertSettings.accumulation,
                    min=1,
                    max=1024,
                    tooltip="Batches averaged into one step: like a larger batch, but slower instead of larger.",
                ),
                io.Combo.Input("schedule", options=list(SCHEDULES), tooltip="How the learning rate goes over the run."),
                io.Int.Input(
                    "warmup",
                    default=ExpertSettings.warmup,
                    min=0,
                    max=1_000_000,
                    tooltip="Steps over which the learning rate rises from zero.",
                ),
                io.Combo.Input(
                    "checkpointing",
                    options=[AUTOMATIC, ON, OFF],
                    tooltip=(
                        "Recompute blocks in backward: far less memory, about a third slower. "
                        "automatic: only when it must."
                    ),
                ),
                io.Float.Input(
                    "weight_decay",
                    default=ExpertSettings.weight_decay,
                    min=0.0,
                    max=10.0,
                    step=0.001,
                    advanced=True,
                    tooltip="How strongly AdamW pulls the LoRA towards zero.",
                ),
                io.Float.Input(
                    "clip_norm",
                    default=ExpertSettings.clip_norm,
                    min=0.0,
                    max=1000.0,
                    advanced=True,
                    tooltip="The largest total gradient a step may have. 0 = no limit.",
                ),
                io.Combo.Input(
                    "save_precision",
                    options=list(PRECISIONS),
                    advanced=True,
                    tooltip="Number format of the file. fp16 is half as large as fp32 and looks the same.",
                ),
            ],
            outputs=[SETTINGS.Output("settings", tooltip="For the settings input of LoRA Trainer.")],
        )

    @classmethod
    def execute(cls, **settings) -> io.NodeOutput:
        return io.NodeOutput(ExpertSettings(**settings))
