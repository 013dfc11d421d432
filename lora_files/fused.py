"""A fused layer of FLUX and its pieces: one LoRA over all rows, or one for each share of them. Both ways are exact.

Pieces that read through the same down matrix are the rows of one up matrix. Others are stacked: their downs one over
the other, their ups down the diagonal of a larger matrix, alpha grown as the rank has. Each way chooses the form from
which the way back gives the very same tensors again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .flux_names import SHARES
from .layers import ALPHA, DOWN, UP

Parts = dict[str, Tensor]
"""The tensors of a plain LoRA layer in kohya's words: up (out, rank), down (rank, in) and, where there is one, alpha.

Those that are given out share no memory, since files of such tensors cannot be written.
"""


def in_pieces(parts: Parts, count: int) -> dict[int, Parts]:
    """The LoRAs of the pieces of a fused layer; a piece without an effect of its own may be missing.

    ValueError when the rows cannot be shared out among so many.
    """
    whole = sum(SHARES[count])
    rows = parts[UP].shape[0]
    if rows % whole:
        raise ValueError(f"its {rows} rows cannot be shared out among {count} layers")
    widths = [rows // whole * share for share in SHARES[count]]
    blocks = parts[UP].split(widths)
    for ranks in _stackings(blocks):
        pieces = _unstacked(parts, blocks, ranks)
        if pieces and _same(fused(pieces, count), parts):
            return pieces
    return {
        number: {name: (block if name == UP else tensor).clone() for name, tensor in parts.items()}
        for number, block in enumerate(blocks)
    }


def fused(pieces: Mapping[int, Parts], count: int) -> Parts:
    """The LoRA of a fused layer; missing pieces change nothing. ValueError when the pieces do not fit together."""
    shares = SHARES[count]
    units = {len(parts[UP]) / shares[number] for number, parts in pieces.items()}
    if len(units) != 1 or len({parts[DOWN].shape[1] for parts in pieces.values()}) != 1:
        raise ValueError("its pieces have sizes that do not fit together")
    unit = int(units.pop())
    if len(pieces) == count and _share_down(pieces):
        shared = {**pieces[0], UP: torch.cat([pieces[number][UP] for number in range(count)])}
        taken = in_pieces(shared, count)
        if taken.keys() == pieces.keys() and all(_same(taken[number], pieces[number]) for number in pieces):
            return shared
    return _stacked(pieces, [unit * share for share in shares])


# One over the other


def _stacked(pieces: Mapping[int, Parts], widths: Sequence[int]) -> Parts:
    numbers = sorted(pieces)
    first = pieces[numbers[0]]
    rank = sum(len(pieces[number][DOWN]) for number in numbers)
    up, column = first[UP].new_zeros(sum(widths), rank), 0
    scale = _scale(first)
    for number in numbers:
        own = pieces[number][UP]
        if _scale(pieces[number]) != scale:
            own = (own.float() * (_scale(pieces[number]) / scale)).to(own.dtype)
        row = sum(widths[:number])
        up[row : row + len(own), column : column + own.shape[1]] = own
        column += own.shape[1]
    stacked = {**first, UP: up, DOWN: torch.cat([pieces[number][DOWN] for number in numbers])}
    if ALPHA in first:
        stacked[ALPHA] = _times(first[ALPHA], rank, len(first[DOWN]), up.dtype)
    return stacked


def _stackings(blocks: Sequence[Tensor]) -> list[list[int]]:
    """The ranks by which pieces may have been stacked: alike, and as the columns show that are not zero."""
    columns, count = blocks[0].shape[1], len(blocks)
    alike = [[columns // count] * count] if columns and columns % count == 0 else []
    owners = torch.stack([block.bool().any(0) for block in blocks])
    if not bool((owners.sum(0) == 1).all()):
        return alike
    return [*alike, owners.sum(1).tolist()]


def _unstacked(parts: Parts, blocks: Sequence[Tensor], ranks: Sequence[int]) -> dict[int, Parts] | None:
    """The pieces by these ranks; None when the up matrix holds something beside its diagonal."""
    pieces, start, rank = {}, 0, len(parts[DOWN])
    for number, (block, own) in enumerate(zip(blocks, ranks, strict=True)):
        place = slice(start, start + own)
        start += own
        if block.count_nonzero() != block[:, place].count_nonzero():
            return None
        if own:
            pieces[number] = {**parts, UP: block[:, place].clone(), DOWN: parts[DOWN][place].clone()}
            if ALPHA in parts:
                pieces[number][ALPHA] = _times(parts[ALPHA], own, rank, block.dtype)
    return pieces


# Comparisons


def _share_down(pieces: Mapping[int, Parts]) -> bool:
    first = {name: tensor for name, tensor in pieces[0].items() if name != UP}
    others = ({name: tensor for name, tensor in parts.items() if name != UP} for parts in pieces.values())
    return all(_same(first, other) for other in others)


def _same(one: Parts, other: Parts) -> bool:
    """Whether two layers are the same to the last bit."""
    return one.keys() == other.keys() and all(_equal(one[name], other[name]) for name in one)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _scale(parts: Parts) -> float:
    return parts[ALPHA].item() / len(parts[DOWN]) if ALPHA in parts else 1.0


def _times(alpha: Tensor, over: int, under: int, weights: torch.dtype) -> Tensor:
    """alpha * over / under, in alpha's own precision where that says it exactly.

    Where it does not, a larger one is float64, which no trainer writes, so that it comes back as it was: in the
    precision of the weights or, where that does not hold it either, in float32.
    """
    value = torch.tensor(alpha.item() * over / under, dtype=torch.float64).reshape(alpha.shape)
    if alpha.dtype == torch.float64:
        candidates = [value.to(dtype) for dtype in (weights, torch.float32)]
        return next((stored for stored in candidates if torch.equal(stored.double(), value)), value)
    stored = value.to(alpha.dtype)
    return stored if over < under or torch.equal(stored.double(), value) else value
