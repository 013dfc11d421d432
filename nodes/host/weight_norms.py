"""How large the weights of a model are, from a sample of each, kept as long as the model is."""

from __future__ import annotations

import math
from weakref import WeakKeyDictionary

import comfy.utils
import torch
from torch import Tensor, nn

from .patches import base_weight
from .weights import QUANTISED

SAMPLE = 65_536
"""So many values of a weight are looked at, at most and evenly spaced."""
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
Part = tuple[int, int, int]
"""Side, start and length of the part of a weight that a patch changes, as in ComfyUI's key maps."""

_kept: WeakKeyDictionary[nn.Module, dict[tuple[str, Part | None], float]] = WeakKeyDictionary()


def squared_norm(patcher, key: str, part: Part | None = None, *, quantised: bool = False) -> float | None:
    """The squared Frobenius norm of a weight, or of a part of it, as the model's file has it.

    Estimated from a sample. Quantised weights are unpacked only where that is asked for, else they give None.
    """
    kept = _kept.setdefault(patcher.model, {})
    if (key, part) not in kept:
        weight = stored_weight(patcher, key)
        if weight is None:
            if not quantised:
                return None
            weight = base_weight(patcher, key)
        kept[key, part] = _estimated(weight if part is None else weight.narrow(*part))
    return kept[key, part]


def stored_weight(patcher, key: str) -> Tensor | None:
    """A weight as the model's file has it, whatever is patched onto it at the moment; None for one that is packed."""
    saved = patcher.backup.get(key)
    weight = comfy.utils.get_attr(patcher.model, key) if saved is None else saved.weight
    if isinstance(weight, QUANTISED) or not isinstance(weight, Tensor) or type(weight) not in (Tensor, nn.Parameter):
        return None
    layer = comfy.utils.get_attr(patcher.model, key.rpartition(".")[0])
    scaled = getattr(layer, "scale_weight", None) is not None
    return None if scaled or weight.is_meta or weight.dtype not in FLOATS else weight.detach()


def _estimated(weight: Tensor) -> float:
    """The mean square of evenly spaced values times how many there are; exact for small weights."""
    rows = weight.flatten(1) if weight.ndim > 1 else weight[:, None]
    count, columns = rows.numel(), rows.shape[1]
    if count <= SAMPLE:
        return rows.cpu().double().square().sum().item()
    # Without a common divisor of step and columns every column is met as often as every other.
    step = -(-count // SAMPLE)
    while math.gcd(step, columns) > 1:
        step += 1
    if rows.is_contiguous():
        values = rows.view(-1)[::step]
    else:
        places = torch.arange(0, count, step, device=rows.device)
        # Tensors of eight-bit floats cannot be indexed on every device, their bytes can.
        bits = rows.view(torch.uint8) if rows.dtype.itemsize == 1 else rows
        values = bits[places // columns, places % columns].view(rows.dtype)
    return values.float().cpu().double().square().mean().item() * count  # other devices may have no float64
