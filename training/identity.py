"""What decides the weights of a run, without settings that have no effect under the others."""

from __future__ import annotations

from collections.abc import Mapping

from .config import L2, LOGIT_NORMAL, LOKR, OFT, SHIFT
from .schedule import RESTARTS

MASKED = "masked"
"""Whether any picture has a mask; runs of earlier versions do not say."""


def effective(one: Mapping, other: Mapping) -> tuple[dict, dict]:
    """Two identities (nodes/job.py) without what changes nothing: equal ones are the same training.

    Runs on disk keep the whole of it, so that what is left out here can change. The same pictures have the same masks,
    so it is enough that one of the two says whether there are any.
    """
    masked = one.get(MASKED, other.get(MASKED, True))
    return _effective({**one, MASKED: masked}), _effective({**other, MASKED: masked})


def idle(lora: Mapping, train: Mapping) -> list[str]:
    """The names of the settings that have no effect beside the others, as the configurations call them."""
    objective, text = train["objective"], train["text"]
    asked = objective["preservation"] or text["new_tokens"]
    unasked = [name for name in _unasked(objective) if name != "class_words" or not asked]
    return [*unasked, *_untrained(text), *_unadapted(lora), *_unrepeated(train)]


def _effective(identity: Mapping) -> dict:
    # A LoKr that does not say lokr_factor is of an earlier version, whose states lie in memory in another order.
    train, lora = identity.get("train", {}), identity.get("lora", {})
    # Earlier versions had no mask_preservation.
    objective, text = {"mask_preservation": 0.0} | train.get("objective", {}), train.get("text", {})
    unused = [*_unasked(objective), *([] if identity[MASKED] else ["mask_floor", "mask_preservation"])]
    parts = {"objective": _without(objective, unused), "text": _without(text, _untrained(text))}
    train = _without(train, _unrepeated(train))
    return {**identity, "train": {**train, **parts}, "lora": _without(lora, _unadapted(lora))}


def _unasked(objective: Mapping) -> list[str]:
    # The class words that are used are part of the dataset's fingerprint, wherever they come from.
    unused = ["class_words"]
    if objective.get("loss") == L2:
        unused += ["huber_c", "huber_schedule"]
    if objective.get("multires_iterations") == 0:
        unused += ["multires_discount"]
    if objective.get("timesteps") != SHIFT:
        unused += ["timestep_shift"]
    if objective.get("timesteps") != LOGIT_NORMAL:
        unused += ["timestep_mean", "timestep_std"]
    return unused


def _unadapted(lora: Mapping) -> list[str]:
    return [
        *(["rank_stabilized"] if lora.get("kind") == OFT else []),
        *(["lokr_factor"] if lora.get("kind") != LOKR else []),
    ]


def _unrepeated(train: Mapping) -> list[str]:
    return [] if train.get("schedule") == RESTARTS else ["restarts"]


def _untrained(text: Mapping) -> list[str]:
    return [
        *(["encoder_stop"] if text.get("encoder_rate") == 0 else []),
        *(["token_rate"] if text.get("new_tokens") == 0 else []),
    ]


def _without(settings: Mapping, names: list[str] | tuple[str, ...]) -> dict:
    return {name: value for name, value in settings.items() if name not in names}
