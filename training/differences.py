"""In what a training differs from another one of its name, in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .identity import effective

WORDS = {
    "vae": "VAE",
    "clip": "text encoders or new words",
    "dataset": "pictures or captions",
    "start_from": "LoRA to start from",
}
MOST_NAMED = 4


def differences(one: Mapping, other: Mapping) -> list[str]:
    """What differs between two identities, each a thing or a setting by its name."""
    return list(dict.fromkeys(_names(*effective(one, other))))


def named_beside(title: str, name: str, identity: Mapping, others: Mapping[str, Mapping]) -> str:
    """Why a new training of that title gets another name, `others` being the identities of those there are."""
    if not others:
        return (
            f"The folder '{title}' for LoRA files is taken by files whose training is not among the runs here, so this "
            f"training is called '{name}'."
        )
    nearest = min(others, key=lambda run: len(differences(identity, others[run])))
    found = differences(identity, others[nearest])
    if not found:
        return f"'{nearest}' stays as it is: this training starts over and is called '{name}'."
    more = " and more" if len(found) > MOST_NAMED else ""
    return (
        f"'{nearest}' was trained with other values ({', '.join(found[:MOST_NAMED])}{more}) and stays as it is: this "
        f"training is called '{name}'."
    )


def _names(one: Mapping, other: Mapping) -> Iterator[str]:
    for key in [*one, *(key for key in other if key not in one)]:
        mine, theirs = one.get(key), other.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            yield from _names(mine, theirs)
        elif mine != theirs:
            yield WORDS.get(key, key)
