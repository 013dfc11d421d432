"""Picture files made on the spot, and an encoder that writes down what it was asked."""

import io
import struct
import zlib
from pathlib import Path

import numpy
import torch
from PIL import Image
from torch import Tensor


def draw(path: Path, size: tuple[int, int] = (64, 64), colour="red", caption: str | None = None) -> Path:
    """A picture of one colour, with a caption file beside it when there is a caption."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def folder_of(folder: Path, count: int, caption: str | None = "a thing") -> Path:
    """A folder with this many pictures, all with one caption."""
    for number in range(count):
        draw(folder / f"{number}.png", caption=caption)
    return folder


def pixels(data: bytes) -> numpy.ndarray:
    """The colours (H, W, 3) in a picture file."""
    return numpy.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def png(size: tuple[int, int], bits: int, colours: int, pixels: bytes) -> bytes:
    """A PNG file with this header, whether or not the pixels, each row behind a filter byte, go with it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", *size, bits, colours, 0, 0, 0)
    data = zlib.compress(pixels) if pixels else b""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def deep_png() -> bytes:
    """A PNG file of 96 x 64 with 16 bits for each of red, green and blue."""
    row = b"\0" + struct.pack(">3H", 0xC080, 0x4040, 0x0101) * 96
    return png((96, 64), 16, 2, row * 64)


class ToyEncoder:
    """Averages 8 x 8 pixels as its latents and counts letters as its text; remembers every question in ``asked``."""

    def __init__(self, latents_key: str = "vae 1", text_key: str = "clip 1"):
        self.latents_key, self.text_key = latents_key, text_key
        self.asked: list[str | tuple[int, int]] = []

    def latents(self, pixels: Tensor) -> Tensor:
        self.asked.append((pixels.shape[1], pixels.shape[0]))
        return torch.nn.functional.avg_pool2d(pixels.permute(2, 0, 1), 8)

    def text(self, caption: str) -> dict[str, Tensor]:
        self.asked.append(caption)
        letters = torch.tensor([float(ord(letter)) for letter in caption] or [0.0])
        return {"cross_attn": letters[:, None].expand(-1, 4), "pooled": letters.mean()[None]}

    @property
    def pictures(self) -> list[tuple[int, int]]:
        return [question for question in self.asked if isinstance(question, tuple)]

    @property
    def captions(self) -> list[str]:
        return [question for question in self.asked if isinstance(question, str)]
