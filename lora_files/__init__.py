"""LoRA files apart from training: opened safely, taken apart, merged, resized, extracted, renamed and looked into.

It knows PyTorch and safetensors and uses `training` for what a file says and how it is written, but not ComfyUI.
"""
