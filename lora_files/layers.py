"""The layers of a LoRA file, whoever wrote it: what each changes about a weight, and how much.

The parts of a layer are named in kohya's words whatever form the file has: diffusers and peft call the same two
matrices lora_B and lora_A, older scripts `_lora.up` or `lora_linear_layer.up`. All changes are those that ComfyUI's
loader makes:

    lora   s B A                     s = alpha / rank, 1 without alpha
    loha   s (B1 A1) * (B2 A2)       elementwise
    lokr   s C (x) (B A)             Kronecker product; s = 1 where neither factor is a product

Convolutions with a core tensor (Tucker) have it multiplied in.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..training.config import DORA, LOHA, LOKR, LORA, OFT
from ..training.embeddings import layers_only
from ..training.factors import Factors

DIFFERENCE, UNKNOWN = "difference", "unknown"
TITLES = {LORA: "LoRA", DORA: "DoRA", LOHA: "LoHa", LOKR: "LoKr", OFT: "OFT", DIFFERENCE: "full difference"}
"""The kinds as they are written."""
TEXT_ENCODERS = ("lora_te", "text_encoder", "lora_prior_te")
"""What the names of the layers of text encoders begin with."""
UP, DOWN, MID, ALPHA = "lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha"

ENDS = {
    r"(_lora|\.lora|\.lora_linear_layer)\.up\.weight|\.lora_up\.weight|\.lora_B(\.default)?(\.weight)?": UP,
    r"(_lora|\.lora|\.lora_linear_layer)\.down\.weight|\.lora_down\.weight|\.lora_A(\.default)?(\.weight)?": DOWN,
    r"\.lora_magnitude_vector(\.default)?(\.weight)?": "dora_scale",
    r"\.lora_B(\.default)?\.bias": "lora_up.bias",
}
"""How the matrices of a LoRA are called by those who do not write as kohya does."""
OTHERS = re.compile(
    r"\.(lora_mid\.weight|alpha|dora_scale|hada_(w[12]_[ab]|t[12])|lokr_(w[12](_[ab])?|t2)|oft_blocks|rescale|[ab][12]\.weight"
    r"|diff|diff_b|w_norm|b_norm|set_weight|reshape_weight)$"
)
EXACT = re.compile(r"\.(alpha|dora_scale|lora_magnitude_vector(\.default)?(\.weight)?)$")
"""Numbers that keep their precision whatever the rest is stored in: each scales a whole layer or column of a weight."""
READ = [(re.compile(f"(?:{pattern})$"), part) for pattern, part in ENDS.items()]
SUMS = ("diff", "diff_b", "w_norm", "b_norm")
"""Parts that are added to a weight or a bias as they are."""


@dataclass(frozen=True)
class Layer:
    """What a file holds for one layer; `parts` are the tensors by the ends of their names, in kohya's words."""

    name: str
    kind: str
    parts: dict[str, Tensor]

    @property
    def rank(self) -> int | None:
        """How many rows the down matrix has; None for kinds that have none."""
        parts = self.parts
        for name in (DOWN, "hada_w1_b", "lokr_w2_b", "lokr_w1_b"):
            if name in parts and (name[:-4] not in parts if name.startswith("lokr") else True):
                return len(parts[name]) if parts[name].ndim else None
        return None

    @property
    def scale(self) -> float:
        """alpha / rank; 1 without alpha, and where it limits something else (OFT)."""
        alpha = self.parts.get(ALPHA)
        if alpha is None or not self.rank or self.kind in (OFT, DIFFERENCE):
            return 1.0
        if alpha.numel() != 1:
            raise ValueError(f"The alpha of layer '{self.name}' is no single number: train or download the file again.")
        return float(alpha.float().item()) / self.rank

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that is changed, (out, in) or (out, in, h, w), as far as the file says it.

        A LoHa of a convolution says (out, in h w); a layer of unknown kind says (), and one that only changes a bias.
        """
        parts = self.parts
        if self.kind == LORA:
            core = parts[MID].shape[2:] if MID in parts else ()
            return (len(parts[UP]), *parts[DOWN].shape[1 : 2 if core else None], *core)
        if self.kind == DIFFERENCE:
            return tuple(next((parts[name].shape for name in ("diff", "w_norm") if name in parts), ()))
        if self.kind == LOHA and "hada_t1" in parts:
            return (parts["hada_w1_a"].shape[1], parts["hada_w1_b"].shape[1], *parts["hada_t1"].shape[2:])
        if self.kind == LOHA:
            return (len(parts["hada_w1_a"]), parts["hada_w1_b"].shape[1])
        if self.kind == LOKR:
            first, second = (factor.shape for factor in self.kronecker_factors())
            return (first[0] * second[0], first[1] * second[1], *second[2:])
        return ()

    def factors(self) -> Factors | None:
        """The change in factors, up (out, n) times its scale and down (n, in h w), float32; None but for a LoRA."""
        if self.kind != LORA:
            return None
        down = self.parts[DOWN].float()
        if MID in self.parts:
            down = torch.einsum("mn...,nj->mj...", self.parts[MID].float(), down.flatten(1))
        return Factors(self.parts[UP].flatten(1).float() * self.scale, down.flatten(1))

    def change(self) -> Tensor | None:
        """The change (out, in h w) of the weight in float32 at strength 1; None when it depends on the weight."""
        if self.kind == LORA:
            factors = self.factors()
            return factors.up @ factors.down
        if self.kind == LOHA:
            return (self.scale * _product(self.parts, "hada", 1) * _product(self.parts, "hada", 2)).flatten(1)
        if self.kind == LOKR:
            return _kronecker(*self.kronecker_factors()).mul_(self.scale).flatten(1)
        if self.kind == DIFFERENCE and (weight := self.parts.get("diff", self.parts.get("w_norm"))) is not None:
            return weight.float().flatten(1) if weight.ndim > 1 else weight.float().reshape(-1, 1)
        return None

    def norm(self) -> float | None:
        """The Frobenius norm of the change of the weight; None where `change` is None."""
        if self.kind == LORA:
            return self.factors().squared_norm() ** 0.5
        if self.kind == LOKR:
            return abs(self.scale) * _norm(self.kronecker_factors()[0]) * _norm(self.kronecker_factors()[1])
        change = self.change()
        return None if change is None else _norm(change)

    def kronecker_factors(self) -> tuple[Tensor, Tensor]:
        """What a LoKr is the Kronecker product of, float32 and without the scale."""
        return tuple(
            self.parts[f"lokr_w{number}"].float()
            if f"lokr_w{number}" in self.parts
            else _product(self.parts, "lokr", number)
            for number in (1, 2)
        )


def layers_of(tensors: Mapping[str, Tensor]) -> dict[str, Layer]:
    """Every layer of a file by its name there, in any form of key that ComfyUI's loader reads, in the file's order.

    What is called as no part of a layer is a layer of its own, of unknown kind; bundled embeddings are none.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in layers_only(tensors).items():
        name, part = split(key)
        parts.setdefault(name, {})[part] = tensor
    return {name: Layer(name, kind_of(own), own) for name, own in parts.items()}


def split(key: str) -> tuple[str, str]:
    """A tensor's name as the name of its layer and that of its part; a part we do not know is ""."""
    for pattern, part in READ:
        if found := pattern.search(key):
            return key[: found.start()], part
    if found := OTHERS.search(key):
        return key[: found.start()], found[0][1:]
    return key, ""


def kind_of(parts: Mapping[str, Tensor]) -> str:
    """The kind of a layer by its parts; unknown too for parts that are missing or cannot be multiplied."""
    kind = next((kind for kind, fits in FITS.items() if fits(parts)), UNKNOWN)
    return DORA if "dora_scale" in parts and kind in (LORA, LOHA, LOKR) else kind


def _is_lora(parts: Mapping[str, Tensor]) -> bool:
    up, down, mid = parts.get(UP), parts.get(DOWN), parts.get(MID)
    if up is None or down is None or min(up.ndim, down.ndim) < 2 or up.shape[1:].numel() != len(down):
        return False
    return mid is None or (
        mid.ndim > 2 and mid.shape[:2] == (len(down), len(down)) and down.shape[1:].numel() == down.shape[1]
    )


def _is_loha(parts: Mapping[str, Tensor]) -> bool:
    return _multiplies(parts, "hada", 1) and _multiplies(parts, "hada", 2)


def _is_lokr(parts: Mapping[str, Tensor]) -> bool:
    def there(number: int) -> bool:
        whole = parts.get(f"lokr_w{number}")
        return whole.ndim >= 2 if whole is not None else _multiplies(parts, "lokr", number)

    return there(1) and there(2) and len(parts.keys() & {"lokr_w1", "lokr_w1_a"}) > 0


def _is_oft(parts: Mapping[str, Tensor]) -> bool:
    return "oft_blocks" in parts


def _is_difference(parts: Mapping[str, Tensor]) -> bool:
    return bool(parts) and parts.keys() <= {*SUMS, ALPHA} and any(name in parts for name in SUMS)


FITS = {LORA: _is_lora, LOHA: _is_loha, LOKR: _is_lokr, OFT: _is_oft, DIFFERENCE: _is_difference}


def _names(network: str, number: int) -> tuple[str, str, str]:
    return f"{network}_w{number}_a", f"{network}_w{number}_b", f"hada_t{number}" if network == "hada" else "lokr_t2"


def _multiplies(parts: Mapping[str, Tensor], network: str, number: int) -> bool:
    first, second, core = (parts.get(name) for name in _names(network, number))
    if first is None or second is None or first.ndim != 2 or second.ndim != 2:
        return False
    if core is None or (network == "lokr" and number == 1):
        return first.shape[1] == len(second)
    return core.ndim > 2 and core.shape[:2] == (len(first), len(second))


def _product(parts: Mapping[str, Tensor], network: str, number: int) -> Tensor:
    """One factor of a LoHa or LoKr: a times b, or a core tensor with a and b on its first two sides."""
    first, second, core = (parts.get(name) for name in _names(network, number))
    if core is None or (network == "lokr" and number == 1):
        return first.float() @ second.float()
    return torch.einsum("ij...,jr,ip->pr...", core.float(), second.float(), first.float())


def _kronecker(first: Tensor, second: Tensor) -> Tensor:
    first = first.reshape(*first.shape, *[1] * (second.ndim - first.ndim))
    return torch.kron(first, second.contiguous())


def _norm(tensor: Tensor) -> float:
    return tensor.double().norm().item()


def lora_tensors(name: str, up: Tensor, down: Tensor, alpha: float, shape: Sequence[int] = ()) -> dict[str, Tensor]:
    """A plain LoRA as a file holds it: up (out, n) and down (n, in h w), in the form of a weight of this shape.

    `shape` is (out, in) or () for a linear layer and (out, in, h, w) for a convolution.
    """
    if len(shape) > 2:
        up, down = up.reshape(*up.shape, *[1] * (len(shape) - 2)), down.reshape(len(down), *shape[1:])
    entries = {UP: up.contiguous(), DOWN: down.contiguous(), ALPHA: torch.tensor(float(alpha))}
    return {f"{name}.{part}": tensor for part, tensor in entries.items()}
