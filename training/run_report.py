"""The report of a run: one HTML page that holds everything it shows, to keep, to print and to hand on."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from PIL import Image

from . import curve, picking
from .checkpoint import Checkpoint, Checkpoints, Validation, mean_of
from .figures import loss_chart
from .run import TrainingRun
from .scores import comparable, percent_better
from .whole_file import write_atomically

FILE = "report.html"
PREVIEW_WIDTH, SHEET_WIDTH, CHART_WIDTH, MOST_COLUMNS = 256, 1600, 960, 8
STYLE = """
:root { --ink: #1f2933; --soft: #5a6b7b; --line: #dde4ec; --paper: #fff; --wash: #f5f7fa; --mark: #c2410c; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 70rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.75rem 0 .75rem; padding-bottom: .35rem; border-bottom: 1px solid var(--line); }
p { margin: .5rem 0; } .soft { color: var(--soft); }
header { display: flex; gap: 1.5rem; align-items: flex-start; } header > div { flex: 1; }
header img { width: 11rem; border-radius: 8px; }
.verdict { margin: 1rem 0 0; padding: .8rem 1rem; background: var(--wash); border-left: 4px solid var(--mark);
  border-radius: 0 6px 6px 0; }
dl.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem;
  margin: 1.75rem 0 0; }
dl.facts div { padding: .6rem .8rem; background: var(--wash); border-radius: 6px; }
dl.facts dt { color: var(--soft); font-size: .8rem; }
dl.facts dd { margin: 0; font-weight: 600; overflow-wrap: anywhere; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .75rem .3rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
th { color: var(--soft); font-weight: 600; font-size: .8rem; } td.number, th.number { text-align: right; }
tr.picked td { font-weight: 600; background: #fff7ed; }
.scroll { overflow-x: auto; } .strip td, .strip th { padding: .2rem; border: 0; text-align: center; }
.strip th.prompt { text-align: left; padding-top: .8rem; color: var(--ink); font-weight: 400; }
.strip img { width: 100%; min-width: 6rem; border-radius: 4px; display: block; }
img.wide { width: 100%; border-radius: 6px; display: block; }
pre { padding: .8rem 1rem; background: var(--wash); border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 13px/1.5 ui-monospace, Consolas, monospace; }
ul { padding-left: 1.2rem; } summary { cursor: pointer; color: var(--soft); }
@media print { body { padding: 0; max-width: none; font-size: 12px; } h2 { break-after: avoid; }
  img, tr, .verdict, dl.facts div { break-inside: avoid; } .scroll { overflow: visible; }
  .strip img { min-width: 0; } details > summary { list-style: none; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; } }
"""


@dataclass(frozen=True)
class Findings:
    """What the report says beside what the run itself remembers.

    `previews` is a row for each prompt: the prompt and (step, picture file) in order, the untrained base as step 0.
    `strength` is the recommended one, where it is known. `workflow` is the graph in API form.
    """

    checkpoints: Checkpoints
    family: str
    plan: str
    settings: Mapping[str, object]
    proof: str
    previews: Sequence[tuple[str, Sequence[tuple[int, Path]]]] = ()
    sheet: Image.Image | None = None
    dataset: str = ""
    workflow: Mapping[str, object] = field(default_factory=dict)
    strength: float | None = None


def write(run: TrainingRun, findings: Findings) -> Path:
    """Write the page into the run's folder, unless the same is there already, and say where it is."""
    path, data = run.folder / FILE, page(run, findings).encode()
    if not path.is_file() or path.read_bytes() != data:
        write_atomically(path, data)
    return path


def page(run: TrainingRun, findings: Findings) -> str:
    """The page; it needs no other file and loads nothing."""
    choice = picking.choose(findings.checkpoints, picking.SUGGESTED, 0, picking.BALANCED)
    sections = [
        _head(run, findings, choice),
        _facts(run, findings),
        _section("Previews", _strip(findings, choice.checkpoint.step)),
        _section("Loss", _loss(run)),
        _section("Checkpoints", _checkpoints(findings.checkpoints, choice.checkpoint.step)),
        _section("Held-out pictures", _validation(run)),
        _section("What happened", _list(run.notes)),
        _section("Pictures", _pictures(findings)),
        _section("Settings", _pre(findings.plan) + _settings(findings.settings)),
        _section("The file", f"<p>{escape(findings.proof)}</p>"),
        _section("Training it again", _again(findings)),
    ]
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(run.name)} · LoRA Workbench</title><style>{STYLE}</style></head><body>"
        + "".join(sections)
        + "</body></html>\n"
    )


def loss_picture(run: TrainingRun, title: str) -> Image.Image:
    """The loss of every step that counts, smoothed too, and of the held-out pictures wherever it was measured."""
    points = [(point.step, point.loss, point.sigma) for point in run.points() if point.loss is not None]
    validation = [(step, mean_of(values)) for step, values in run.validations()]
    return loss_chart([point[:2] for point in points], curve.smoothed(points), validation, title)


def _head(run: TrainingRun, findings: Findings, choice: picking.Picked) -> str:
    trigger = findings.checkpoints.trigger_word
    words = [findings.family, f"trigger word “{trigger}”" if trigger else "no trigger word"]
    if findings.strength is not None:
        words.append(f"recommended strength {findings.strength:g}")
    cover = _cover(findings, choice.checkpoint.step)
    return (
        f"<header><div><h1>{escape(run.name)}</h1><p class='soft'>LoRA for {escape(', '.join(words))}</p>"
        f"<p class='verdict'>{escape(choice.reason)}</p></div>{cover}</header>"
    )


def _cover(findings: Findings, step: int) -> str:
    for _, row in findings.previews:
        for at, path in row:
            if at == step:
                return _image(Image.open(path), PREVIEW_WIDTH, f"Preview at step {step}")
    return ""


def _facts(run: TrainingRun, findings: Findings) -> str:
    points, checkpoints = run.points(), findings.checkpoints
    seconds = sum(point.seconds or 0 for point in points)
    facts = {
        "Steps": f"{run.step:,}",
        "Training time": _duration(seconds),
        "Checkpoints": f"{len(checkpoints.entries)}"
        + (f" and {len(checkpoints.averages)} averages" if checkpoints.averages else ""),
    }
    if points:
        facts["A step takes"] = f"{seconds / len(points):.3g} s"
    measured = picking.measured_of(checkpoints)
    if measured:
        gains = [percent_better(entry.validation, checkpoints.base_validation) for entry in measured]
        facts["Best on held-out pictures"] = f"{max(gains):+.1f} %"
    rows = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    return f"<dl class='facts'>{rows}</dl>"


def _strip(findings: Findings, picked: int) -> str:
    """A row of pictures for each prompt; of many steps the first, the last, the picked one and a spread of others."""
    rows = []
    for prompt, pictures in findings.previews:
        chosen = _spread(list(pictures), picked)
        rows.append(f"<tr><th class='prompt' colspan='{len(chosen)}'>{escape(prompt)}</th></tr>")
        headings = "".join(f"<th>{f'step {step}' if step else 'untrained'}</th>" for step, _ in chosen)
        cells = "".join(
            f"<td>{_image(Image.open(path), PREVIEW_WIDTH, f'{prompt}, step {step}')}</td>" for step, path in chosen
        )
        rows.append(f"<tr>{headings}</tr><tr>{cells}</tr>")
    return f"<div class='scroll'><table class='strip'>{''.join(rows)}</table></div>" if rows else ""


def _spread(pictures: list, picked: int) -> list:
    """At most `MOST_COLUMNS` of (step, file), the picked step always among them."""
    if len(pictures) <= MOST_COLUMNS:
        return pictures
    last = len(pictures) - 1
    places = {round(number * last / (MOST_COLUMNS - 1)) for number in range(MOST_COLUMNS)}
    wanted = [place for place, (step, _) in enumerate(pictures) if step == picked and place not in places]
    if wanted:
        nearest = min(places - {0, last}, key=lambda place: abs(place - wanted[0]))
        places = places - {nearest} | {wanted[0]}
    return [pictures[place] for place in sorted(places)]


def _loss(run: TrainingRun) -> str:
    if not run.points():
        return ""
    chart = _image(loss_picture(run, "Loss by step"), CHART_WIDTH, "Loss by step", "wide")
    return chart + f"<p>{escape(curve.diagnose(run.curve()).sentence)}</p>"


def _checkpoints(checkpoints: Checkpoints, picked: int) -> str:
    base, rows = checkpoints.base_validation, []
    for entry in checkpoints.entries:
        loss = "" if entry.loss is None else f"{entry.loss:.4f}"
        rows.append((entry.step == picked, (entry.lora_name, str(entry.step), loss, _gain(entry, base))))
    for entry in checkpoints.averages:
        rows.append((False, (entry.lora_name, f"{entry.average}, {entry.step}", "", _gain(entry, base))))
    return _table(("file", "step", "training loss", "better than the base"), rows)


def _gain(entry: Checkpoint, base: Validation | None) -> str:
    """How much lower the held-out loss is than the base model's; empty where they cannot be compared."""
    return f"{percent_better(entry.validation, base):+.1f} %" if comparable(entry.validation, base) else ""


def _validation(run: TrainingRun) -> str:
    """The held-out loss by step: the mean over pictures at each noise level, and over all."""
    measured = run.validations()
    if not measured:
        return ""
    levels = len(measured[0][1][0])
    rows = []
    for step, values in measured:
        means = [sum(picture[level] for picture in values) / len(values) for level in range(levels)]
        cells = [str(step) if step else "untrained", *(f"{mean:.4f}" for mean in (*means, mean_of(values)))]
        rows.append((False, cells))
    heading = ("step", *(f"noise level {number}" for number in range(1, levels + 1)), "mean")
    names = run.fact("held_out") or ()
    told = f"Kept out of training: {escape(', '.join(map(str, names)))}. " if names else ""
    # Else the percentages above seem to contradict the means below.
    told += "Noise level 1 is the lowest. In “better than the base” each level counts the same, however large its loss."
    return f"<p class='soft'>{told}</p>" + _table(heading, rows)


def _pictures(findings: Findings) -> str:
    sheet = "" if findings.sheet is None else _image(findings.sheet, SHEET_WIDTH, "The training pictures", "wide")
    return (_pre(findings.dataset) if findings.dataset else "") + sheet


def _settings(settings: Mapping[str, object]) -> str:
    rows = [(False, (name, value)) for name, value in _flat(settings)]
    return f"<details><summary>All settings</summary>{_table(('setting', 'value'), rows)}</details>"


def _flat(settings: Mapping[str, object], above: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{name} · ")
        else:
            yield f"{above}{name}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _again(findings: Findings) -> str:
    told = (
        "<p>Drop a preview picture of this run on ComfyUI's canvas: the graph comes back as it was queued. Every LoRA "
        "file of this run holds it too, with all settings; the graph below does the same, saved as a .json file.</p>"
    )
    if not findings.workflow:
        return ""
    graph = json.dumps(findings.workflow, indent=1, ensure_ascii=False)
    return told + f"<details><summary>The graph, in API form</summary>{_pre(graph)}</details>"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>" if lines else ""


def _pre(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"


def _table(heading: Sequence[str], rows: Sequence[tuple[bool, Sequence[str]]]) -> str:
    """Rows of cells, each row with whether it is the picked one; all but the first column hold numbers."""
    head = "".join(f"<th{' class=number' if place else ''}>{escape(name)}</th>" for place, name in enumerate(heading))
    lines = []
    for picked, cells in rows:
        inner = "".join(
            f"<td{' class=number' if place else ''}>{escape(cell)}</td>" for place, cell in enumerate(cells)
        )
        lines.append(f"<tr{' class=picked' if picked else ''}>{inner}</tr>")
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"


def _image(picture: Image.Image, width: int, words: str, kind: str = "") -> str:
    """A picture inside the page, no wider than `width`: drawings as PNG, photographs as JPEG."""
    small = picture.convert("RGB")
    small.thumbnail((width, 100 * width), Image.Resampling.LANCZOS)
    buffer, form = io.BytesIO(), "PNG" if width == CHART_WIDTH else "JPEG"
    small.save(buffer, form, **({"quality": 85} if form == "JPEG" else {}))
    data = base64.b64encode(buffer.getvalue()).decode()
    named = f" class='{kind}'" if kind else ""
    return f'<img{named} src="data:image/{form.lower()};base64,{data}" alt="{escape(words)}">'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{seconds:.3g} s"
