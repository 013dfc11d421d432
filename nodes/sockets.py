"""The socket types that flow between our nodes."""

from comfy_api.latest import io

DATASET = io.Custom("LORA_DATASET")
CHECKPOINTS = io.Custom("LORA_CHECKPOINTS")
SETTINGS = io.Custom("LORA_TRAINING_SETTINGS")
STACK = io.Custom("LORA_STACK")
"""The ecosystem's own type: a list of (name relative to the loras folder, strength_model, strength_clip)."""

CATEGORY = "LoRA Workbench"
