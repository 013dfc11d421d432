"""What is trained on: examples, datasets, and what can be done with them without opening a file."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import ImageColor

from .augmentation import Augmentation
from .buckets import sizes_for
from .wording import Wording

# What a picture is for: to learn from, to remember (pictures of the class), or to measure with.
TRAIN, REGULARIZATION, VALIDATION = "train", "regularization", "validation"
ROLES = (TRAIN, REGULARIZATION, VALIDATION)

SMALLEST, LARGEST = 64, 4096  # resolutions that can be asked for


@dataclass(frozen=True)
class Example:
    """One picture file and the caption it is trained with."""

    path: Path
    caption: str
    width: int
    height: int
    repeats: int = 1
    variants: tuple[str, ...] = ()  # further captions of the same picture, the trigger word in them
    mask: Path | None = None  # a grey picture, white = learn this; the picture itself when its alpha channel says so
    fill_masked: bool = False  # what the mask leaves out is painted over with what lies beside it
    trigger_word: str = ""  # of its concept
    class_words: str = ""  # what it is, e.g. "zork star" of the kohya folder "10_zork star"
    weight: float = 1.0  # factor on its loss
    role: str = TRAIN  # TRAIN or REGULARIZATION


@dataclass(frozen=True)
class Dataset:
    """The pictures of one folder or several, to train on and held out for validation, and how they are trained.

    `notes` says in sentences what is odd. Raises ValueError for a setting that cannot be.
    """

    folder: Path
    examples: tuple[Example, ...]
    held_out: tuple[Example, ...] = ()
    trigger_word: str = ""
    resolution: int = 1024
    notes: tuple[str, ...] = ()
    uncaptioned: tuple[Path, ...] = ()  # pictures nobody has described yet
    resolutions: tuple[int, ...] = ()  # all sizes to train at; () = (resolution,)
    background: str = "white"  # what shows through transparent parts
    largest_enlargement: float = 0.0  # never scale a picture up beyond this factor; 0 = no limit
    wording: Wording = Wording()
    augmentation: Augmentation = Augmentation()

    def __post_init__(self) -> None:
        if self.largest_enlargement and self.largest_enlargement < 1:
            raise ValueError(f"largest_enlargement must be 0 or at least 1, got {self.largest_enlargement:g}.")
        try:
            ImageColor.getrgb(self.background)
        except ValueError as error:
            raise ValueError(f"background is '{self.background}': give a colour such as white or #808080.") from error

    @property
    def concepts(self) -> tuple[Example, ...]:
        """The examples that show what is to be learnt: all but regularization pictures."""
        return tuple(example for example in self.examples if example.role == TRAIN)

    @property
    def shares(self) -> tuple[int, int]:
        """How often a round shows pictures of concepts, and how many regularization pictures there are for it.

        Both with repeats; where there are more of the second they take turns, as many in a round as the first.
        """
        own, everything = (sum(e.repeats for e in some) for some in (self.concepts, self.examples))
        return own, everything - own

    @property
    def regularization_a_round(self) -> int:
        """How many regularization pictures come while as many of the others come as there are, repeats and all."""
        own, others = self.shares
        return round(len(self.concepts) * min(own, others) / max(1, own))

    @property
    def all_resolutions(self) -> tuple[int, ...]:
        """The resolutions trained at; the largest decides how much memory a step takes."""
        return self.resolutions or (self.resolution,)

    def sizes_of(self, example: Example) -> tuple[tuple[int, int], ...]:
        """The sizes (width, height) that a picture is trained at, smallest first."""
        return sizes_for(example.width, example.height, self.all_resolutions, self.largest_enlargement)


def insert_trigger(caption: str, trigger: str) -> str:
    """The caption with `trigger` put first, unless it is there as a whole word in any case; otherwise verbatim."""
    trigger = trigger.strip()
    if not trigger or says(caption, trigger):
        return caption
    return f"{trigger}, {caption}" if caption.strip() else trigger


def says(caption: str, trigger: str) -> bool:
    """Whether the caption holds the trigger word as a whole word, in any case."""
    return re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", caption, re.IGNORECASE) is not None


def lines_of(text: str) -> list[str]:
    """The captions in a text, one a line."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def with_captions(dataset: Dataset, captions: Mapping[Path, str]) -> Dataset:
    """The dataset with new captions, one a line, for the pictures in `captions`; the trigger word of each concept is
    inserted where it is absent, and a picture without words is called by its class.
    """

    def recaptioned(example: Example) -> Example:
        if example.path not in captions:
            return example
        lines = lines_of(captions[example.path]) or [example.class_words]
        first, *others = (insert_trigger(line, example.trigger_word) for line in lines)
        return replace(example, caption=first, variants=tuple(others))

    emptied = tuple(e.path for e in dataset.examples + dataset.held_out if not captions.get(e.path, "kept").strip())
    changed = replace(
        dataset,
        examples=tuple(map(recaptioned, dataset.examples)),
        held_out=tuple(map(recaptioned, dataset.held_out)),
        uncaptioned=tuple(path for path in dataset.uncaptioned if path not in captions) + emptied,
    )
    return replace(changed, notes=_other_notes(dataset) + caption_notes(changed))


def joined(datasets: Sequence[Dataset]) -> Dataset:
    """The pictures of all datasets as one, each with its own trigger word, repeats, weight and role.

    The last of them decides how they are trained, and a note says where another one differs. Pictures that are held
    out in one of them are trained on in none.
    """
    last = datasets[-1]
    held_out = {example.path: example for dataset in datasets for example in dataset.held_out}
    examples = tuple(e for dataset in datasets for e in dataset.examples if e.path not in held_out)
    both = sum(len(dataset.examples) for dataset in datasets) - len(examples)
    notes = [note for dataset in datasets for note in _other_notes(dataset)]
    notes += (note for dataset in datasets[:-1] for note in _differences(dataset, last))
    if both:
        notes.append(f"{both} pictures are in one dataset to train on and in another to measure with: only the latter.")
    whole = replace(
        last,
        examples=examples,
        held_out=tuple(held_out.values()),
        trigger_word=triggers_of([*examples, *held_out.values()]),
        uncaptioned=tuple(unique(path for dataset in datasets for path in dataset.uncaptioned)),
    )
    return replace(whole, notes=(*unique(notes), *_leaks(whole), *caption_notes(whole)))


def _leaks(dataset: Dataset) -> Iterator[str]:
    """Regularization is to keep the class as it is, so a trigger word in one of its captions undoes what is learnt."""
    for trigger in unique(example.trigger_word for example in dataset.concepts):
        found = [e for e in dataset.examples if e.role == REGULARIZATION and e.caption and says(e.caption, trigger)]
        if found:
            yield (
                f"Regularization captions hold the trigger word '{trigger}' ({len(found)}, e.g. that of "
                f"{found[0].path.name}): take it out there, or the word comes to mean the class."
            )


def resolutions_in(text: str, resolution: int) -> tuple[int, ...]:
    """All sizes to train at when those in a text such as "512, 768" come on top of `resolution`; () when none does."""
    words = re.split(r"[\s,;]+", text.strip(" \t\n,;"))
    if any(not re.fullmatch(r"\d{2,4}", word) or not SMALLEST <= int(word) <= LARGEST for word in words if word):
        raise ValueError(
            f"extra_resolutions is '{text[:100]}': give whole numbers from {SMALLEST} to {LARGEST} with commas "
            "between, such as 512, 768."
        )
    extra = {int(word) for word in words if word} - {resolution}
    return tuple(sorted({*extra, resolution})) if extra else ()


def triggers_of(examples: Iterable[Example]) -> str:
    """The trigger words of all concepts, with commas between."""
    return ", ".join(unique(example.trigger_word for example in examples))


def caption_notes(dataset: Dataset) -> tuple[str, ...]:
    """What is told about pictures without a caption."""
    missing = set(dataset.uncaptioned)
    pictures = dataset.examples + dataset.held_out
    if not missing:
        return ()
    used = {example.caption for example in pictures if example.path in missing}
    triggers = {example.trigger_word for example in pictures} | {dataset.trigger_word}
    instead = "the name of their folder is used"
    if used <= triggers:
        instead = "no text at all is used" if used <= {""} else "the trigger word alone is used"
    have = "has" if len(missing) == 1 else "have"
    counted = f"{len(missing)} of {len(pictures)} pictures {have}"
    return (f"{counted} no caption, e.g. {dataset.uncaptioned[0].name}: {instead}.",)


def unique(items: Iterable) -> list:
    """The items that say something, each once, in their order."""
    return [item for item in dict.fromkeys(items) if item]


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """A sort key that puts `2.png` before `10.png`."""
    parts = re.findall(r"\d+|\D+", text.casefold())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _other_notes(dataset: Dataset) -> tuple[str, ...]:
    """The notes that new captions leave as they are."""
    stale = caption_notes(dataset)
    return tuple(note for note in dataset.notes if note not in stale)


def _differences(dataset: Dataset, last: Dataset) -> list[str]:
    """A note on the settings of a dataset that the last one overrules."""
    names = ("resolution", "resolutions", "background", "largest_enlargement", "wording", "augmentation")
    other = [name for name in names if getattr(dataset, name) != getattr(last, name)]
    told = f"the last loader decides how all pictures are trained, so its own {', '.join(other)} do not count"
    return [f"{dataset.folder.name}: {told}."] if other else []
