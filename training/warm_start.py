"""Adapters that begin as a LoRA file ends, whatever its rank.

A change that is known in factors is taken over as it is where the rank suffices, and cut to its largest singular values
where it does not (Eckart & Young 1936). What is left of the rank begins as in any new LoRA: down drawn, up zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .factors import Factors
from .lora import Adapter


def start_low_rank(adapter: Adapter, factors: Factors) -> tuple[float, float]:
    """Begin a LoRA or DoRA as the change of these factors; the squared norms of what is kept and of all of it.

    A DoRA's magnitude becomes what it must be for that, once the weight can be read.
    """
    rank = len(adapter.down)
    kept = whole = None
    if factors.up.shape[1] > rank:
        factors, kept, whole = factors.reduced(rank)
    root = abs(1 / adapter.scale) ** 0.5
    with torch.no_grad():
        up, down = adapter.up, adapter.down
        taken = factors.up.shape[1]
        up.zero_()
        down[:taken] = (factors.down * root).view(taken, *down.shape[1:]).to(down)
        if up.ndim == 4:
            up[:, :taken] = (factors.up * root)[:, :, None, None].to(up)
        else:
            up[:taken] = (factors.up * root).t().to(up)
        if "magnitude" in adapter.tensors:
            adapter.tensors["magnitude"].zero_()
    if kept is None:
        kept = whole = adapter.kind.norm(adapter.tensors, adapter.scale).item() ** 2
    return kept, whole


def start_same_kind(adapter: Adapter, entries: Mapping[str, Tensor], scale: float) -> bool:
    """Begin as what a file holds of a layer in the adapter's own kind and at a rank not above its own.

    `entries` by the names in a file, `scale` alpha / rank as the loader computes it, for OFT alpha. False, and nothing
    changed, when the two do not fit one another.
    """
    own, tensors = adapter.tensors, {name: tensor.float() for name, tensor in entries.items()}
    if "magnitude" in own:
        return _start_dora(adapter, tensors, scale)
    if "oft_blocks" in own:
        return _start_oft(adapter, tensors, scale)
    if "lokr_w1" in own:
        return _grown(own, _as_ours(tensors, own), "lokr_w1", scale / adapter.scale)
    return _grown(own, tensors, "hada_w1_b", scale / adapter.scale)


def _start_dora(adapter: Adapter, tensors: dict[str, Tensor], scale: float) -> bool:
    """The magnitude is taken over with the factors, which only have its meaning together."""
    needed = {"lora_up.weight", "lora_down.weight", "dora_scale"}
    if tensors.keys() != needed or tensors["dora_scale"].shape != adapter.tensors["magnitude"].shape:
        return False
    up, down = tensors["lora_up.weight"].flatten(1), tensors["lora_down.weight"].flatten(1)
    if len(down) > len(adapter.down):
        return False
    start_low_rank(adapter, Factors(up * scale, down))
    with torch.no_grad():
        adapter.tensors["magnitude"].copy_(tensors["dora_scale"])
    return True


def _start_oft(adapter: Adapter, tensors: dict[str, Tensor], limit: float) -> bool:
    own, blocks = adapter.tensors["oft_blocks"], tensors.get("oft_blocks")
    if tensors.keys() != {"oft_blocks"} or blocks.shape != own.shape:
        return False
    norm = (blocks - blocks.transpose(1, 2)).norm().item()
    if limit and norm > limit:
        blocks, norm = blocks * (limit / norm), limit
    if adapter.scale and norm > adapter.scale:
        return False
    with torch.no_grad():
        own.copy_(blocks)
    return True


def _as_ours(tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A LoKr's factors multiplied out where the adapter keeps them whole."""
    tensors = dict(tensors)
    for name in ("lokr_w1", "lokr_w2"):
        parts = f"{name}_a", f"{name}_b"
        if name in own and tensors.keys() >= set(parts):
            whole = tensors.pop(parts[0]) @ tensors.pop(parts[1])
            tensors[name] = whole.view_as(own[name]) if whole.shape == own[name].flatten(1).shape else whole
    return tensors


def _grown(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], scaled: str, factor: float) -> bool:
    """Copy, one of them times a factor, and add to the rank where the file's is lower.

    The rows of every b are the rank: zero ones keep the product as it was.
    """
    if tensors.keys() != own.keys():
        return False
    ranks = {name: len(tensor) for name, tensor in tensors.items() if name.endswith("_b")}
    for name, tensor in tensors.items():
        shape = list(own[name].shape)
        partner = f"{name[:-1]}b"
        if name in ranks:
            shape[0] = min(shape[0], ranks[name])
        elif partner in ranks:
            shape[1] = min(shape[1], ranks[partner])
        if list(tensor.shape) != shape:
            return False
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in ranks:
                own[name].zero_()
            own[name][tuple(slice(0, size) for size in tensor.shape)] = tensor * factor if name == scaled else tensor
    return True
