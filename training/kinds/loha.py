"""LoHa: the entry-wise product of two changes of low rank, whose rank is the product of theirs (FedPara, 2022)."""

from __future__ import annotations

from torch import Tensor, nn

from ..config import LoraConfig
from .kind import Forward, Kind, MadeWeight, Tensors, frozen_forward, kernel_of, peft_shapes, sides

NAMES = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")


class Loha(Kind):
    """dW = s (w1_a w1_b) * (w2_a w2_b), each a (out, rank), each b (rank, in h w)."""

    zero = ("hada_w2_b",)
    factors = NAMES
    file_names = {name: name for name in NAMES}

    def shapes(self, layer: nn.Module, rank: int, config: LoraConfig) -> dict[str, tuple[int, ...]]:
        return peft_shapes("loha", *sides(layer), kernel_of(layer), rank)

    def rank(self, tensors: Tensors) -> int:
        return tensors["hada_w1_b"].shape[0]

    def forward(self, layer, tensors, scale, weights, thinned) -> Forward:
        base, kernel, factors = frozen_forward(layer, weights), kernel_of(layer), [tensors[name] for name in NAMES]

        def change(*factors: Tensor) -> Tensor:
            return _product(*factors).unflatten(1, (-1, *kernel)) * scale if kernel else _product(*factors) * scale

        return lambda x: base(x) + MadeWeight.apply(thinned(x), layer, change, *factors)

    def norm(self, tensors: Tensors, scale: float) -> Tensor:
        return scale * _product(*(tensors[name] for name in NAMES)).norm()


def _product(w1_a: Tensor, w1_b: Tensor, w2_a: Tensor, w2_b: Tensor) -> Tensor:
    return (w1_a @ w1_b) * (w2_a @ w2_b)
