"""A thousand LoRA files that nobody should have made, each made anew from a seed."""

from __future__ import annotations

import json
import math
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path

SEED, COUNT = 20261122, 1000
KEY = "lora_unet_double_blocks_0_img_attn_proj"


def whole(random: random.Random) -> tuple[dict, bytes]:
    """The header and the payload of a good little LoRA file."""
    rows, columns, rank = (random.randint(1, 6) for _ in range(3))
    header, payload = {"__metadata__": {"ss_base_model_version": "flux1"}}, b""
    for name, shape in (("lora_up.weight", [rows, rank]), ("lora_down.weight", [rank, columns]), ("alpha", [])):
        size = 4 * math.prod(shape)
        place = [len(payload), len(payload) + size]
        header[f"{KEY}.{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": place}
        payload += b"".join(struct.pack("<f", random.uniform(-1, 1)) for _ in range(size // 4))
    return header, payload


def packed(header: dict | str | bytes, payload: bytes, length: int | None = None) -> bytes:
    """The file; `length` is what it claims of its header."""
    text = header if isinstance(header, (str, bytes)) else json.dumps(header)
    text = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


def an_entry(random: random.Random, header: dict) -> dict:
    return header[random.choice([name for name in header if name != "__metadata__"])]


# What is wrong with them: each takes a source of chance and gives a file's bytes


def cut_off(random):
    data = packed(*whole(random))
    return data[: random.randrange(len(data))]


def continued(random):
    return packed(*whole(random)) + random.randbytes(random.randint(1, 99))


def noise(random):
    return random.randbytes(random.randint(0, 3000))


def another_format(random):
    beginnings = (
        b"PK\x03\x04",
        b"\x80\x02}q\x00",
        b"\x89PNG\r\n\x1a\n",
        b"GGUF",
        b"#!/bin/sh\n",
        b"{}",
        b"<html>",
        b"",
    )
    return random.choice(beginnings) + random.randbytes(random.randint(0, 200))


def header_too_long(random):
    length = random.choice((2**63 - 1, 2**64 - 1, 2**62, 100_000_001, 10**9, random.randrange(10**4, 2**64)))
    return packed(*whole(random), length=length)


def header_too_short(random):
    header, payload = whole(random)
    return packed(header, payload, length=random.randrange(len(json.dumps(header))))


def header_no_json(random):
    text = json.dumps(whole(random)[0])
    place = random.randrange(len(text))
    broken = text[:place] + random.choice(('"', "{", "]", "\\", "\x00", "NaN,")) + text[place + 1 :]
    return packed(broken if not is_json(broken) else "{", b"")


def header_in_another_encoding(random):
    header, payload = whole(random)
    return packed(json.dumps(header).encode(random.choice(("utf-16", "utf-32", "utf-16-be"))), payload)


def header_of_another_kind(random):
    value = random.choice(([], [1], "text", 1, None, True, [[]], {"a": []}, {"a": None}, {"a": "b"}, {"a": {}}))
    return packed(json.dumps(value), b"")


def nested(random):
    depth = random.choice((100, 10_000, 300_000))
    begin, end = random.choice((("[", "]"), ('{"a":', "}")))
    text = random.choice((f"{begin * depth}1{end * depth}", begin * depth))
    return packed(random.choice((text, f'{{"a":{text}}}', f'{{"__metadata__":{text}}}')), b"")


def endless_list(random):
    return packed(f'{{"a":{{"dtype":"F32","shape":[{"1," * 300_000}1],"data_offsets":[0,4]}}}}', b"\0" * 4)


def wrong_dtype(random):
    header, payload = whole(random)
    wrong = (
        "F33",
        "f32",
        "",
        "OBJECT",
        "F4",
        "C64",
        "I1",
        32,
        None,
        ["F32"],
        {"F32": 1},
        "../F32",
        "F32\0",
        "F64",
        "I64",
    )
    an_entry(random, header)["dtype"] = random.choice(wrong)
    return packed(header, payload)


def wrong_shape(random):
    header, payload = whole(random)
    wrong = ([-1], [-1, -4], [2**62, 4], [2**31] * 8, [0, 2**62], [0, 2**40, 2**40], [1.0], ["4"], [True], [None], None)
    wrong += ("44", {}, 4, [1] * 65, [1] * 9, [10**400], [4, 4, 4, 4], [1e309], [0])
    an_entry(random, header)["shape"] = random.choice(wrong)
    return packed(header, payload)


def wrong_place(random):
    header, payload = whole(random)
    entry = an_entry(random, header)
    start, end = entry["data_offsets"]
    wrong = (
        [-4, 0],
        [start, 2**63],
        [2**63, 2**63 + 4],
        [end, start - 1],
        [start + 1, end + 1],
        [start],
        [start, end, end],
    )
    wrong += (
        None,
        "0:4",
        [0.5, 4.5],
        [str(start), str(end)],
        [10**500, 10**500],
        [start + 4, end + 4],
        {},
        [None, None],
    )
    entry["data_offsets"] = random.choice(wrong)
    return packed(header, payload)


def overlapping(random):
    header, payload = whole(random)
    names = [name for name in header if name != "__metadata__"]
    one, other = random.sample(names, 2)
    header[one] = dict(header[other])
    return packed(header, payload)


def a_hole(random):
    header, payload = whole(random)
    gap = random.randint(1, 64)
    for entry in (value for name, value in header.items() if name != "__metadata__"):
        entry["data_offsets"] = [place + gap for place in entry["data_offsets"]]
    return packed(header, b"\0" * gap + payload)


def named_twice(random):
    header, payload = whole(random)
    text = json.dumps(header)
    name = random.choice(list(header))
    again = f"{json.dumps(name)}: {json.dumps(header[name])}"
    return packed(text[:-1] + f", {again}}}" if random.random() < 0.5 else f"{{{again}, {text[1:]}", payload)


def named_as_a_path(random):
    names = (
        "../../etc/passwd",
        "/etc/passwd",
        "..\\..\\x",
        "C:\\x",
        "\\\\server\\x",
        "a/../b",
        "..",
        "a\0b",
        "\x1b[2J",
        "",
    )
    names += ("a\nb", "x" * 600, "x" * 200_000, "\u202egnp.exe", "\ud800", "file:///etc/passwd", "\u2028", "/")
    header, payload = whole(random)
    old = f"{KEY}.{random.choice(('lora_up.weight', 'alpha'))}"
    ending = old[len(KEY) :] if random.random() < 0.5 else ""
    header = {random.choice(names) + ending if name == old else name: value for name, value in header.items()}
    if any(name.startswith(".") and len(name) < 20 and "/" not in name for name in header):
        header["../x"] = header.pop(next(iter(header)))
    return packed(header, payload)


def wrong_metadata(random):
    header, payload = whole(random)
    wrong = (
        [],
        1,
        "text",
        None,
        {"a": 1},
        {"a": None},
        {"a": ["b"]},
        {"a": {"b": "c"}},
        {"\ud800": "x"},
        {"a": "\udfff"},
    )
    header["__metadata__"] = random.choice(wrong)
    return packed(header, payload)


def more_said_than_known(random):
    header, payload = whole(random)
    entry = an_entry(random, header)
    if random.random() < 0.5:
        entry[random.choice(("device", "data", "__reduce__", "requires_grad"))] = "x"
    else:
        del entry[random.choice(list(entry))]
    return packed(header, payload)


def not_finite(random):
    header, payload = whole(random)
    value = random.choice((float("nan"), float("inf"), float("-inf")))
    place = random.randrange(len(payload) // 4) * 4
    return packed(header, payload[:place] + struct.pack("<f", value) + payload[place + 4 :])


def too_many(random):
    return packed("{" + ",".join(f'"{number}":{{}}' for number in range(110_000)) + "}", b"")


KINDS: tuple[tuple[Callable, int], ...] = (
    (cut_off, 120),
    (continued, 30),
    (noise, 60),
    (another_format, 40),
    (header_too_long, 60),
    (header_too_short, 40),
    (header_no_json, 80),
    (header_in_another_encoding, 12),
    (header_of_another_kind, 30),
    (nested, 30),
    (endless_list, 2),
    (wrong_dtype, 90),
    (wrong_shape, 90),
    (wrong_place, 90),
    (overlapping, 50),
    (a_hole, 20),
    (named_twice, 40),
    (named_as_a_path, 60),
    (wrong_metadata, 24),
    (more_said_than_known, 20),
    (not_finite, 10),
    (too_many, 2),
)
"""What is wrong, and how many files have it."""


def is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def files() -> list[tuple[str, bytes]]:
    """The thousand, each with the name of what is wrong with it."""
    chance = random.Random(SEED)
    return [(kind.__name__, kind(chance)) for kind, count in KINDS for _ in range(count)]


def digest_of(folder: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file below a folder with its size, its time of change and what it holds."""
    found = (Path(place) / name for place, _, names in os.walk(folder) for name in names)
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns, path.read_bytes()) for path in found if path.is_file()
    }


def reasons(sentences: list[str]) -> list[str]:
    """What is wrong by each sentence, without the names and numbers of one file."""
    return [re.sub(r"'[^']*'|\d[\d,]*", "_", sentence) for sentence in sentences]
