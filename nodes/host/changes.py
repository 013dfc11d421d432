"""How much LoRAs change each weight and how alike their changes are: inner products, kept as long as the model is.

Plain LoRAs are never multiplied out: <B1 A1, B2 A2> = tr((B2^T B1)(A1 A2^T)). Strengths only scale, so all products
are those at strength 1.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import combinations_with_replacement
from weakref import WeakKeyDictionary

import torch
from comfy.weight_adapter import LoKrAdapter, LoRAAdapter
from torch import Tensor, nn

from ...training.factors import Factors
from .patches import (
    Patches,
    base_weight,
    change_of,
    depends_on_weight,
    factors_of_patch,
    magnitude_of,
    place_of,
    scale_of,
    shape_of,
)
from .weight_norms import stored_weight

MOST_PAIRS = 256
"""Of so many pairs of files the products are kept."""
Products = dict[str, float]
"""A weight's key -> the inner product of two changes of it."""

_kept: WeakKeyDictionary[nn.Module, OrderedDict[frozenset, Products]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Changes:
    """What one file changes: by each weight's key the loader's patches, and the weights of another size than these."""

    content: Hashable
    by_weight: dict[str, Patches] = field(default_factory=dict)
    misfits: list[str] = field(default_factory=list)


def changes_by_weight(content: Hashable, patches: Mapping[object, object], patcher_of: Callable) -> Changes:
    """The loader's patches, gathered by the weight they change; `patcher_of` gives the patcher that has a weight."""
    changes = Changes(content)
    for target, patch in patches.items():
        key, place = place_of(target)
        if fits(patch, place, _shape(patcher_of(key), key)):
            changes.by_weight.setdefault(key, []).append((patch, place))
        else:
            changes.misfits.append(key)
    return changes


def _shape(patcher, key: str) -> tuple[int, ...] | None:
    """None for a weight that the model lacks, such as the bias of a layer without one."""
    try:
        return shape_of(patcher, key)
    except AttributeError:
        return None


def fits(patch: object, place: tuple[object, object] | None, shape: Sequence[int] | None) -> bool:
    """Whether there is such a weight, and a plain LoRA has its size; else the loader passes it over."""
    if shape is None:
        return False
    if not isinstance(patch, LoRAAdapter) or patch.weights[3] is not None or patch.weights[5] is not None:
        return True
    shape = list(shape)
    if place and place[0] is not None:
        side, _, shape[side] = place[0]
    up, down = patch.weights[:2]
    if min(up.ndim, down.ndim) < 2 or not up.numel() or not down.numel():
        return False
    return up[0].numel() == len(down) and len(up) * down[0].numel() == math.prod(shape)


def products(patcher, key: str, changes: Sequence[Changes], *, every_kind: bool) -> dict[frozenset, float]:
    """The inner products of all pairs of changes of one weight, each with itself too, by the contents of the pair.

    Without `every_kind` only those that need no product of matrices as large as the weight.
    """
    kept = _kept.setdefault(patcher.model, OrderedDict())
    patches = {one.content: one.by_weight[key] for one in changes}
    pairs = [frozenset(pair) for pair in combinations_with_replacement(patches, 2)]
    missing = [pair for pair in pairs if key not in kept.get(pair, ())]
    if not every_kind:
        missing = [pair for pair in missing if _is_cheap(pair, patches)]
    if missing:
        for pair, product in _computed(patcher, key, patches, missing).items():
            kept.setdefault(pair, {})[key] = product
            kept.move_to_end(pair)
    found = {pair: kept[pair][key] for pair in pairs if key in kept.get(pair, ())}
    while len(kept) > max(MOST_PAIRS, len(pairs)):
        kept.popitem(last=False)
    return found


def _is_cheap(pair: frozenset, patches: Mapping[Hashable, Patches]) -> bool:
    """Whether a product needs no matrix as large as the weight."""
    return all(map(_is_plain, (patches[content] for content in pair))) or (
        len(pair) == 1 and all(_has_cheap_norm(patches[content]) for content in pair)
    )


def _computed(
    patcher, key: str, patches: Mapping[Hashable, Patches], pairs: Collection[frozenset]
) -> dict[frozenset, float]:
    involved = {content: own for content, own in patches.items() if any(content in pair for pair in pairs)}
    shape = shape_of(patcher, key)
    plain = {content: _factors(own, shape, patcher.load_device) for content, own in involved.items() if _is_plain(own)}
    found = {pair: product for pair, product in gram(plain).items() if pair in pairs}
    others = [pair for pair in pairs if pair not in found]
    for pair in [pair for pair in others if len(pair) == 1]:
        (content,) = pair
        if _has_cheap_norm(involved[content]):
            found[pair] = _cheap_norm(*involved[content][0])
    others = [pair for pair in others if pair not in found]
    needed = {content for pair in others for content in pair} - plain.keys()
    dense = {content: _dense(patcher, key, involved[content]) for content in needed}
    return found | {pair: _inner(plain, dense, *(pair if len(pair) == 2 else 2 * tuple(pair))) for pair in others}


def gram(factors: Mapping[Hashable, Factors]) -> dict[frozenset, float]:
    """The inner products of all pairs of changes that are known in factors, by two products of all of them at once."""
    if not factors:
        return {}
    up = torch.cat([own.up for own in factors.values()], 1)
    down = torch.cat([own.down for own in factors.values()], 0)
    ranks = [own.up.shape[1] for own in factors.values()]
    # Added up on the CPU: Apple's and Intel's GPUs have no float64.
    sizes = ((up.t() @ up) * (down @ down.t())).cpu().double()
    whose = torch.repeat_interleave(torch.eye(len(ranks), dtype=torch.float64), torch.tensor(ranks), 1)
    values = (whose @ sizes @ whose.t()).tolist()
    names = list(factors)
    return {frozenset((names[a], names[b])): values[a][b] for a in range(len(names)) for b in range(a, len(names))}


def _is_plain(patches: Patches) -> bool:
    """Whether all of one file's patches of a weight are plain LoRAs."""
    return all(
        isinstance(patch, LoRAAdapter)
        and not any(part is not None for part in patch.weights[3:6])
        and (place is None or (place[1] is None and place[0][0] < 2))
        for patch, place in patches
    )


def _factors(patches: Patches, shape: Sequence[int], device: torch.device) -> Factors:
    """All of one file's patches of a weight in factors, where the model computes."""
    flat = shape[0], math.prod(shape[1:])
    first, *others = (factors_of_patch(patch, place, flat) for patch, place in patches)
    total = reduce(Factors.plus, others, first)
    return Factors(total.up.to(device), total.down.to(device))


def _dense(patcher, key: str, patches: Patches) -> Tensor:
    """The change of a weight, multiplied out, in float32."""
    before = None
    if any(depends_on_weight(patch) for patch, _ in patches):
        stored = stored_weight(patcher, key)
        before = (
            base_weight(patcher, key) if stored is None else stored.to(patcher.load_device, torch.float32, copy=True)
        )
    return change_of(patcher, key, patches, before)


def _inner(plain: Mapping, dense: Mapping, first: Hashable, second: Hashable) -> float:
    """<D1, D2> or, with one of them in factors, <B A, D> = <A, B^T D>."""
    if first in plain:
        first, second = second, first
    change = dense[first].flatten(1) if dense[first].ndim > 1 else dense[first][:, None]
    if second in plain:
        product = plain[second].down * (plain[second].up.t() @ change)
    else:
        product = change * dense[second].view_as(change)
    return product.sum(-1).cpu().double().sum().item()


def _has_cheap_norm(patches: Patches) -> bool:
    """Whether this is one difference or one LoKr, whose norms need no matrix as large as the weight."""
    (patch, place), *others = patches
    if others or (place and place[1] is not None):
        return False
    if isinstance(patch, LoKrAdapter):
        w1, w2, _, w1_a, w1_b, w2_a, w2_b, core, _ = patch.weights
        there = _is_there(w1, w1_a, w1_b) and _is_there(w2, w2_a, w2_b)
        return there and magnitude_of(patch) is None and core is None
    return isinstance(patch, tuple) and patch[0] == "diff"


def _is_there(whole: Tensor | None, first: Tensor | None, second: Tensor | None) -> bool:
    """Whether a factor can be had, whole or as a product; the loader asks no file whether it can."""
    if whole is not None:
        return True
    return first is not None and second is not None and first.ndim == second.ndim == 2 and first.shape[1] == len(second)


def _cheap_norm(patch: object, _place: object) -> float:
    """The squared norm of a difference, or of a LoKr: |C (x) D| = |C| |D|."""
    if isinstance(patch, tuple):
        return _square(patch[1][0])
    w1, w2, alpha, w1_a, w1_b, w2_a, w2_b, _, _ = patch.weights
    # The loader divides alpha by the rank of the last factor that is a product, and has no alpha where none is.
    rank = len(w2_b) if w2 is None else len(w1_b) if w1 is None else 0
    w1 = w1_a.float() @ w1_b.float() if w1 is None else w1
    w2 = w2_a.float() @ w2_b.float() if w2 is None else w2
    return (scale_of(alpha, rank) if rank else 1.0) ** 2 * _square(w1) * _square(w2)


def _square(tensor: Tensor) -> float:
    return tensor.cpu().double().square().sum().item()
