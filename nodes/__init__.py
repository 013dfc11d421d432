"""All that knows ComfyUI: one file a node, the seam in host/, and what several nodes share."""
