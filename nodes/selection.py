"""One queueing of the Picker: measure the files, decide, draw them, and ask where the user wants to be asked."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from ..training import description, picking, score_chart, signals
from ..training.checkpoint import Checkpoint, Checkpoints
from ..training.dataset import Dataset, Example
from ..training.scores import STANDARD, THOROUGH, Score, Scored, agree, comparable, mean_difference, percent_better
from . import grid
from .host.architecture import family_of
from .host.choice import Choice
from .host.progress import Progress
from .host.sampling import SamplerSettings
from .looks import Looks
from .measure import Measure

LEAKS, DRIFTS = 0.05, 0.15
"""A LoRA leaks below this dependence on its trigger word, and drifts above this change of its class."""


@dataclass(frozen=True)
class Request:
    """The Picker's inputs."""

    model: object
    clip: object
    vae: object
    checkpoints: Checkpoints
    pick: str = picking.SUGGESTED
    at_step: int = 0
    preference: str = picking.BALANCED
    prompts: tuple[str, ...] = ()
    seed: int = 0
    size: int = 1024
    dataset: Dataset | None = None
    """Pictures to measure with; those that were not trained on count as kept out."""
    clip_vision: object = None
    effort: str = STANDARD
    scope: str = grid.SHORTLIST
    strengths: tuple[float, ...] = (1.0,)
    finds_strength: bool = True
    ask_minutes: float = 0.0

    @property
    def settings(self) -> SamplerSettings:
        """How the grid is drawn."""
        return SamplerSettings.square(family_of(self.model), self.size, self.seed)


@dataclass(frozen=True)
class Selection:
    """The chosen file and why, and what was measured and drawn for it; `pictures` are those of the scores' rows."""

    checkpoint: Checkpoint
    reason: str
    decision: picking.Decision
    base: Score
    scored: tuple[Scored, ...]
    pictures: tuple[str, ...]
    grid: grid.Grid
    notes: tuple[str, ...]


def execute(request: Request, progress: Progress, shown: Choice) -> Selection:
    """Choose a file. Raises ValueError with one sentence when there is none, and ComfyUI's interrupt on cancel."""
    wanted, request = None, replace(request, checkpoints=_there(request.checkpoints))
    if request.pick in (picking.LAST, picking.AT_STEP):
        wanted = picking.choose(request.checkpoints, request.pick, request.at_step, request.preference)
    elif not request.checkpoints.entries:
        raise ValueError(picking.why_none(request.checkpoints))
    held_out, training = pictures_of(request)
    with _measure(request, held_out, training, progress) if wanted is None else nullcontext() as measure:
        base, scored = _told(request.checkpoints) if measure is None else _measured(request, measure, progress)
        decision = picking.decide(scored, base, request.preference)
        _tell(shown, scored, base, decision)
        drawn = _drawn(request, decision, wanted, progress, shown)
        looks = Looks(request, drawn, training, triggers_of(request), progress)
        if request.preference == picking.LIKENESS:
            decision = picking.decide(scored, base, request.preference, looks.likeness())
            _tell(shown, scored, base, decision)
        chosen, reason = (wanted.checkpoint, wanted.reason) if wanted else _answered(request, decision, shown)
        signs = [] if measure is None else _signs(request, measure, scored, chosen)
        told = [] if measure is None else _pictures_say(measure, base, scored)
        notes = (*signals.weight_notes(scored), *signs, *told, *looks.notes(chosen))
    asked = held_out if measure is None else (*measure.held_out, *measure.training)
    shown.picked(chosen.lora_name)
    return Selection(
        chosen, reason, decision, base, tuple(scored), tuple(example.path.name for example in asked), drawn, notes
    )


def _tell(shown: Choice, scored: Sequence[Scored], base: Score, decision: picking.Decision) -> None:
    shown.files(table(scored, base, decision))
    shown.say(decision)


def pictures_of(request: Request) -> tuple[list[Example], list[Example]]:
    """(kept out of training, trained on), those of the training and those of the connected dataset.

    Of a folder of files nobody knows what they were trained on, so the dataset's own division counts. Pictures that
    were moved since are passed over.
    """
    trained, more = request.checkpoints.dataset, request.dataset
    if trained is None:
        held_out, training = ([], []) if more is None else (more.held_out, more.concepts)
    else:
        known = {example.path for example in (*trained.examples, *trained.held_out)}
        others = [] if more is None else [e for e in (*more.held_out, *more.concepts) if e.path not in known]
        held_out, training = [*trained.held_out, *others], trained.concepts
    there, learned = ([e for e in some if e.path.is_file()] for some in (held_out, training))
    return there, learned


def triggers_of(request: Request) -> list[str]:
    """The trigger words of the training and of the connected dataset."""
    datasets = [some for some in (request.checkpoints.dataset, request.dataset) if some is not None]
    told = [request.checkpoints.trigger_word, *(some.trigger_word for some in datasets)]
    return list(dict.fromkeys(word.strip() for words in told for word in words.split(",") if word.strip()))


def _there(checkpoints: Checkpoints) -> Checkpoints:
    """The files that nobody deleted since the training handed them on."""
    entries, averages = (
        tuple(entry for entry in some if Path(entry.path).is_file())
        for some in (checkpoints.entries, checkpoints.averages)
    )
    return replace(checkpoints, entries=entries, averages=averages)


def _measure(request: Request, held_out: list[Example], training: list[Example], progress: Progress) -> Measure:
    shown_as = request.checkpoints.dataset or request.dataset
    return Measure(request.model, request.clip, request.vae, held_out, training, request.effort, progress, shown_as)


def _told(checkpoints: Checkpoints) -> tuple[Score, list[Scored]]:
    """The base and every file as the trainer itself measured them."""
    own = [Scored(entry, Score(entry.validation or [])) for entry in grid.in_order(checkpoints)]
    return Score(checkpoints.base_validation or []), own


def _measured(request: Request, measure: Measure, progress: Progress) -> tuple[Score, list[Scored]]:
    """The base and every file, the trainer's own figures taken where they fit."""
    checkpoints, scored = request.checkpoints, []
    base, known = measure.base(), checkpoints.base_validation or []
    # They fit when the trainer asked this model about these pictures: then it said the same of the base.
    reused = agree(base.held_out, known[: len(base.held_out)])
    entries = grid.in_order(checkpoints)
    for number, entry in enumerate(entries):
        progress.live.phase("Measuring", number, len(entries))
        progress.update(number, len(entries))
        score = measure.of(Path(entry.path), entry.lora_name, known=entry.validation if reused else None)
        scored.append(Scored(entry, score))
    return base, scored


def _drawn(
    request: Request,
    decision: picking.Decision,
    wanted: picking.Picked | None,
    progress: Progress,
    shown: Choice,
) -> grid.Grid:
    around = decision if wanted is None else replace(decision, checkpoint=wanted.checkpoint)
    columns = grid.columns(request.checkpoints, around, request.scope, request.strengths)
    if not columns or not request.prompts:
        return grid.Grid()
    shown.drawing(request.prompts)

    def told(cell: grid.Cell) -> None:
        shown.cell(cell.lora, cell.strength, cell.prompt, cell.path)

    return grid.draw(
        request.model, request.clip, request.vae, columns, request.prompts, request.settings, progress, told
    )


def _answered(request: Request, decision: picking.Decision, shown: Choice) -> tuple[Checkpoint, str]:
    """The suggested file, or the one that the user chooses."""
    if request.pick != picking.ASK_ME:
        return decision.checkpoint, decision.reason
    asked = shown.ask(default=decision.checkpoint.lora_name, timeout_minutes=request.ask_minutes)
    chosen = next(entry for entry in grid.in_order(request.checkpoints) if entry.lora_name == asked)
    return chosen, f"{chosen.heading.capitalize()} was chosen by eye. Measured: {decision.reason}"


def _signs(request: Request, measure: Measure, scored: Sequence[Scored], chosen: Checkpoint) -> list[str]:
    """What else the probe says of the chosen file: its best strength, its trigger word, and how its class drifted."""
    if not (measure.held_out or measure.training):
        return ["Nothing was measured, as there are no pictures: connect a dataset like the one they were trained on."]
    path, name, notes = Path(chosen.path), chosen.lora_name, []
    if request.finds_strength:
        notes += _strength(measure, path, name)
    score = next(entry.score for entry in scored if entry.checkpoint == chosen)
    leak = measure.leak(path, name, score)
    if leak is not None and leak < LEAKS:
        notes.append(
            f"{min(100, 100 * (1 - leak)):.0f} % of its effect is there without the trigger word, so it will show in "
            "every picture: fine for a style, else train with regularization pictures or preservation."
        )
    drift = measure.drift(path, name) if request.effort == THOROUGH else None
    if drift is not None and drift > DRIFTS:
        notes.append(
            f"What the model draws of the class without the trigger word has drifted ({drift:+.2f}): train with "
            "regularization pictures or preservation, or pick an earlier checkpoint."
        )
    return notes


def _pictures_say(measure: Measure, base: Score, scored: Sequence[Scored]) -> list[str]:
    """Which pictures are hurt, which are memorised, and which captions mislead."""
    names = [example.path.name for example in (*measure.held_out, *measure.training)]
    if not names:
        return []
    captions = signals.caption_notes(base, measure.without_captions(), names)
    return [*captions, *score_chart.reading(scored, base, names)]


def _strength(measure: Measure, path: Path, name: str) -> list[str]:
    """The strength that does best, written into a file of our own for those who load it."""
    found, base = measure.by_strength(path, name)
    found = {strength: values for strength, values in found.items() if comparable(values, base)}
    if not found:
        return []
    best, hint = picking.recommended_strength(found, base)
    if best not in found or mean_difference(found[best], base) >= 0:  # better than the base at none
        return []
    notes = [hint or f"It does best at strength {best:g} on these pictures; eyes often like it a little higher."]
    if description.is_ours(path) and description.read(path).get(description.STRENGTH) != f"{best:g}":
        try:
            description.amend(path, strength=f"{best:g}")
        except OSError as error:  # in use on Windows, or in a folder that is not to be written
            notes.append(f"That strength could not be written into the file ({error}).")
    return notes


def table(scored: Sequence[Scored], base: Score, decision: picking.Decision) -> list[dict]:
    """Every file as the node's panel lists it."""
    safe, left_out = ({entry.lora_name for entry in some} for some in (decision.safe, decision.broken))
    return [
        {
            "lora": entry.checkpoint.lora_name,
            "label": entry.checkpoint.heading,
            "step": entry.checkpoint.step,
            "percent": _percent(entry.score.held_out, base.held_out),
            "training_percent": _percent(entry.score.training, base.training),
            "suggested": entry.checkpoint == decision.checkpoint,
            "safe": entry.checkpoint.lora_name in safe,
            "broken": picking.why_broken(entry.score, base) if entry.checkpoint.lora_name in left_out else "",
        }
        for entry in scored
    ]


def charts(selection: Selection) -> Image.Image:
    """The curve of the files, and under it how each picture does with each of them."""
    curve = score_chart.curve(selection.scored, selection.base, selection.decision)
    heat = score_chart.heat_map(selection.scored, selection.base, selection.pictures)
    whole = Image.new("RGB", (max(curve.width, heat.width), curve.height + heat.height), "white")
    whole.paste(curve)
    whole.paste(heat, (0, curve.height))
    return whole


def report(selection: Selection) -> str:
    """Which file, why, what else was seen, and every file with its figures."""
    decision = selection.decision
    sure = f"Confidence: {decision.confidence}. {decision.kind.capitalize()}."
    rows = [_line(row) for row in table(selection.scored, selection.base, decision)]
    return "\n".join([selection.reason, sure, *selection.notes, *rows])


def _line(row: dict) -> str:
    # Of a folder of files the label may be all that their order tells.
    name = f"{row['label']} ({row['lora']})"
    if row["broken"]:
        return f"{name}: left out, {row['broken']}"
    told = [("held-out", row["percent"]), ("training", row["training_percent"])]
    figures = [
        f"{name} pictures {abs(value):.1f} % {'better' if value >= 0 else 'worse'} than the base"
        for name, value in told
        if value is not None
    ]
    return f"{name}: {', '.join(figures) or 'not measured'}"


def _percent(values: list, base: list) -> float | None:
    return percent_better(values, base) if comparable(values, base) else None
