"""ComfyUI's IMAGE (B, H, W, 3) in 0..1 <-> Pillow."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor


def to_picture(pixels: Tensor) -> Image.Image:
    """A (H, W, 3) tensor as a picture, rounded to 8 bits as ComfyUI's Save Image does."""
    scaled = 255.0 * pixels.float().cpu().numpy()
    return Image.fromarray(np.clip(scaled, 0, 255).astype(np.uint8))


def to_image(picture: Image.Image) -> Tensor:
    """A picture as an IMAGE (1, H, W, 3)."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).astype(np.float32) / 255.0)[None]


def png_bytes(picture: Image.Image, info: PngInfo | None = None) -> bytes:
    """The picture as a PNG file's content, with text about it."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", pnginfo=info, compress_level=4)
    return buffer.getvalue()
