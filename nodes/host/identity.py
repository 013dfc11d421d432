"""A short hash that says whether a loaded model is the same one as before, whatever is patched onto it.

Reading every weight of a 24 GB model would take longer than it saves, so each tensor gives its shape and a few
evenly spaced values. Two models that differ by training differ almost everywhere.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

SAMPLES_PER_TENSOR = 8


def identity_of(patcher) -> str:
    """The identity of a MODEL's, CLIP's or VAE's weights and patches: the same for the same files, in any session."""
    digest = hashlib.sha256()
    for name, tensor in sorted(patcher.model.state_dict().items()):
        # What another node patched may be in use at the moment; the MODEL's own sampling follows below.
        if name.startswith("model_sampling."):
            continue
        # A loaded patch lives in the weight itself; the weight it replaced is kept beside it.
        original = patcher.backup[name].weight if name in patcher.backup else tensor
        if original.device.type == "meta":
            original = _held(patcher.model, name, original)
        digest.update(name.encode())
        _add(digest, original)
    for name, patches in sorted(patcher.patches.items()):
        digest.update(name.encode())
        _add(digest, patches)
    if hasattr(patcher.model, "model_sampling"):
        sampling = patcher.get_model_object("model_sampling")
        digest.update(" ".join(kind.__name__ for kind in type(sampling).__mro__).encode())
        _add(digest, list(sampling.state_dict().values()))
    return digest.hexdigest()[:32]


def _held(model, name: str, shown: Tensor) -> Tensor:
    """The bytes behind a weight of a pack that quantises in its own way and shows a stand-in."""
    found = model
    for part in name.split("."):
        # Some names stand for no weight, only for the room that unpacking one takes.
        found = getattr(found, part, None)
    return found.detach().as_subclass(Tensor) if isinstance(found, Tensor) else shown


def _add(digest, value: object) -> None:
    """Feed a tensor's sample, a number, or a nest of them; adapters of ComfyUI carry theirs in `weights`."""
    if isinstance(value, Tensor):
        digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
        if value.numel() and value.device.type != "meta":
            flat = value.detach().reshape(-1)
            # In single precision the last place of a large embedding would be rounded past its end.
            count = min(SAMPLES_PER_TENSOR, flat.numel())
            places = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long()
            digest.update(flat[places.to(flat.device)].float().cpu().numpy().tobytes())
    elif isinstance(value, (list, tuple)):
        for item in value:
            _add(digest, item)
    elif hasattr(value, "weights"):
        digest.update(type(value).__name__.encode())
        _add(digest, value.weights)
    elif isinstance(value, (bool, int, float, str)):
        digest.update(repr(value).encode())
