"""LoRA Workbench: train, pick and apply LoRAs inside a ComfyUI graph.

ComfyUI reads two names from this file. Nothing else is imported until it asks for the nodes, so that
loading the pack costs nothing and changes nothing.
"""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The extension that lists the nodes; called once by ComfyUI at start."""
    from .nodes.extension import LoraWorkbench

    return LoraWorkbench()
