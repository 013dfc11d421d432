"""The seam: the only place that imports ComfyUI's own modules. Each module here is one service of the host."""
