"""OFT: the outputs of a layer are turned block by block, and nothing else is changed (Qiu et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..config import LoraConfig
from ..frozen import Weights
from .kind import Forward, Kind, Tensors, frozen_forward, sides


class Oft(Kind):
    """W' = R^T W, R block-diagonal with the blocks (I + Q) (I - Q)^-1 (Cayley), Q = blocks - blocks^T.

    `oft_blocks` (number, size, size). The rank is the largest a block may be: the size is the largest divisor of the
    outputs not above it. As in the loader, alpha is the largest norm all Q together may have, 0 setting no limit; and
    the bias is not turned. peft turns the inputs instead and keeps one triangle of Q, which no loader of files reads.
    """

    zero = ("oft_blocks",)
    factors = ("oft_blocks",)
    file_names = {"oft_blocks": "oft_blocks"}

    def shapes(self, layer: nn.Module, rank: int, config: LoraConfig) -> dict[str, tuple[int, ...]]:
        out, _ = sides(layer)
        size = block_size(out, rank)
        return {"oft_blocks": (out // size, size, size)}

    def rank(self, tensors: Tensors) -> int:
        return tensors["oft_blocks"].shape[1]

    def alpha(self, tensors: Tensors, config: LoraConfig) -> float:
        return float(config.alpha)

    def scale(self, tensors: Tensors, config: LoraConfig) -> float:
        """The limit on the norm of Q."""
        return self.alpha(tensors, config)

    def forward(self, layer, tensors, scale, weights, thinned) -> Forward:
        apart = _WithoutBias(weights)
        base, blocks = frozen_forward(layer, apart), tensors["oft_blocks"]
        place = 1 if isinstance(layer, nn.Conv2d) else -1

        def forward(x: Tensor) -> Tensor:
            y = base(x)
            parts = thinned(y).movedim(place, -1).unflatten(-1, blocks.shape[:2])
            turned = torch.einsum("...kn,knm->...km", parts, turning(blocks, scale).to(y.dtype))
            y = y + turned.flatten(-2).movedim(-1, place)
            return y if apart.bias is None else y + apart.bias.view(-1, 1, 1) if place == 1 else y + apart.bias

        return forward

    def norm(self, tensors: Tensors, scale: float) -> Tensor:
        """2 |Q| before alpha limits it: |R - I| for small Q. What that changes of a weight depends on the weight."""
        blocks = tensors["oft_blocks"]
        return 2 * (blocks - blocks.transpose(1, 2)).norm()


def block_size(outputs: int, largest: int) -> int:
    """The largest divisor of the outputs not above `largest`, or the smallest at all, since 1 would turn nothing."""
    divisors = (size for size in range(min(largest, outputs), 1, -1) if outputs % size == 0)
    return next(divisors, None) or next((size for size in range(2, outputs + 1) if outputs % size == 0), 1)


def turning(blocks: Tensor, limit: float) -> Tensor:
    """R - I = 2 Q (I - Q)^-1, block by block."""
    q = _limited(blocks, limit)
    identity = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    # I - Q can always be inverted; to check that, the plain `solve` waits for the device, layer by layer.
    return torch.linalg.solve_ex(identity - q, 2 * q, left=False).result


def _limited(blocks: Tensor, limit: float) -> Tensor:
    q = blocks - blocks.transpose(1, 2)
    norm = q.norm() + 1e-8
    return q * (limit / norm).clamp(max=1) if limit else q


class _WithoutBias:
    """Weights whose bias is kept aside, where it is found after the forward."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self.bias: Tensor | None = None

    def take(self, layer: nn.Module, like: Tensor) -> tuple[Tensor, None, object]:
        weight, bias, ticket = self._weights.take(layer, like)
        self.bias = None if bias is None else bias.clone()
        return weight, None, (bias, ticket)

    def give_back(self, layer: nn.Module, weight: Tensor, bias: None, ticket: object) -> None:
        self._weights.give_back(layer, weight, *ticket)
