"""What decides a picture beside weights, text and sampler: what other nodes set on a MODEL and a CLIP, where it is run.

FreeU, guidance of other kinds, IP adapters and their like are functions and objects among a MODEL's options. They are
told apart by their code and by what they hold; what cannot be told apart at all counts as new in every session.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_patcher
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfyui_version import __version__ as COMFYUI
from torch import Tensor, nn

from .identity import SAMPLES_PER_TENSOR

DEEPEST = 12
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, range)

_unknown: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


def surroundings_of(model, clip) -> str:
    """A short hash: the same for the same options on the same kind of device, in any session."""
    found = _Description()
    patcher = clip.patcher
    found.add([COMFYUI, torch.__version__, optimized_attention, str(model.load_device), str(patcher.load_device)])
    found.add([model.model_options, model.wrappers, model.injections, model.hook_patches, model.weight_wrapper_patches])
    found.add({name: value for name, value in model.object_patches.items() if name != "model_sampling"})
    found.add({name: value for name, value in model.attachments.items() if name != "lora_metadata"})
    found.add([str(model.model.manual_cast_dtype), model.additional_models])
    found.add([type(clip.tokenizer), clip.layer_idx, clip.tokenizer_options, clip.use_clip_schedule])
    found.add([patcher.model_options, patcher.forced_hooks, patcher.object_patches, clip.apply_hooks_to_conds])
    return found.digest.hexdigest()[:32]


class _Description:
    """Feeds values of any kind into a hash, each object once."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._seen: dict[int, tuple[int, Any]] = {}

    def add(self, value: Any, depth: int = 0) -> None:
        """Numbers and texts by what they are, functions by their code, objects by their kind and what they hold."""
        if isinstance(value, PLAIN):
            self._say(type(value).__name__, repr(value))
        elif id(value) in self._seen:
            self._say("again", str(self._seen[id(value)][0]))
        elif depth > DEEPEST:
            self._say("deep", type(value).__qualname__)
        else:
            # The object is kept too, so that its id stays its own.
            self._seen[id(value)] = len(self._seen), value
            self._say("a", f"{type(value).__module__}.{type(value).__qualname__}")
            for part in self._parts(value):
                self.add(part, depth + 1)

    def _parts(self, value: Any) -> list:
        if isinstance(value, Tensor):
            return _samples(value)
        if isinstance(value, Mapping):
            return [part for item in sorted(value.items(), key=lambda item: repr(item[0])) for part in item]
        if isinstance(value, (list, tuple)):
            return list(value)
        if isinstance(value, (set, frozenset)):
            return sorted(map(repr, value))
        if isinstance(value, nn.Module):
            return [part for item in sorted(value.state_dict().items()) for part in item]
        if isinstance(value, comfy.model_patcher.ModelPatcher):
            return [value.model, value.patches, value.model_options]
        return self._held(value)

    def _held(self, value: Any) -> list:
        if isinstance(value, type):
            return [f"{value.__module__}.{value.__qualname__}"]
        if isinstance(value, FunctionType):
            held = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
            return [
                value.__module__,
                value.__qualname__,
                value.__code__,
                value.__defaults__,
                value.__kwdefaults__,
                held,
            ]
        if isinstance(value, CodeType):
            return [value.co_code, value.co_names, [repr(one) for one in value.co_consts if isinstance(one, PLAIN)]]
        if isinstance(value, MethodType):
            return [value.__func__, value.__self__]
        if isinstance(value, partial):
            return [value.func, value.args, value.keywords]
        if hasattr(value, "__dict__"):
            return [vars(value)]
        return [_token(value)]

    def _say(self, kind: str, text: str) -> None:
        self.digest.update(f"{kind}:{len(text)}:{text};".encode())


def _samples(tensor: Tensor) -> list:
    told = [tuple(tensor.shape), tensor.dtype]
    if tensor.numel() and tensor.device.type != "meta":
        flat = tensor.detach().as_subclass(Tensor).reshape(-1)
        count = min(SAMPLES_PER_TENSOR, flat.numel())
        places = torch.linspace(0, flat.numel() - 1, count, dtype=torch.float64).long()
        told.append(flat[places.to(flat.device)].float().cpu().tolist())
    return told


def _is_filled(cell) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:
        return False


def _token(value: Any) -> str:
    """A name for an object about which nothing can be said: its own in this session, another one in the next."""
    try:
        return _unknown.setdefault(value, secrets.token_hex(8))
    except TypeError:
        return secrets.token_hex(8)
