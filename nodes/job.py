"""One queueing of the Trainer: what was asked for, what follows from it, and what it ends with.

Everything is decided and checked here before the first picture is encoded; session.py does the training itself.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, replace

from PIL import Image

from ..training import losses, state
from ..training.cache import fingerprint
from ..training.checkpoint import Checkpoint
from ..training.class_words import with_class_words
from ..training.dataset import Dataset
from ..training.embeddings import new_words
from ..training.identity import MASKED
from ..training.lora import Part
from ..training.plan_notes import epoch_of, notes_on_pictures
from ..training.presets import ExpertSettings, Plan, plan
from ..training.run import TrainingRun
from ..training.targets import UNET, without_effect
from ..training.whole_file import payload_of
from . import session
from .disk import check_disk
from .host import folders
from .host.encoders import GraphEncoder
from .host.graph import Graph
from .host.loras import read_lora
from .host.model import LoadedModel
from .host.progress import Progress
from .host.proof import Proof
from .host.text_training import TrainedText
from .host.warm_start import check_fit, start_words
from .lora_writer import proved, write_words, writer
from .previews import Previews
from .run_page import write_report
from .time_limit import as_fitted


@dataclass(frozen=True)
class Request:
    """The Trainer's inputs. 0 leaves steps, learning_rate, rank and save_every to the preset."""

    model: object
    clip: object
    vae: object
    dataset: Dataset
    name: str
    preset: str
    steps: int = 0
    learning_rate: float = 0.0
    rank: int = 0
    save_every: int = 0
    preview_prompts: str = ""
    seed: int = 0
    start_over: bool = False
    start_from: str = ""
    """A LoRA file to begin with, as the loaders list it."""
    stop_after: float = 0.0
    """Minutes; 0 sets no limit."""
    settings: ExpertSettings = field(default_factory=ExpertSettings)
    graph: Graph = field(default_factory=Graph)


@dataclass(frozen=True)
class Job:
    """A request with everything decided that can be before the work begins."""

    request: Request
    plan: Plan
    denoiser: LoadedModel
    text: TrainedText | None
    """The text encoders, where something is trained in them."""
    encoder: GraphEncoder
    run: TrainingRun
    was_fitted: bool = False
    """Whether the plan was cut to the limit of time in an earlier queueing."""

    @property
    def dataset(self) -> Dataset:
        return self.request.dataset

    @property
    def parts(self) -> list[Part]:
        """The networks that get adapters."""
        return _parts(self.denoiser, self.text)


@dataclass(frozen=True)
class Result:
    """What a queueing ends with: the run, the checkpoint it ends at, its proof, and the strip of previews."""

    run: TrainingRun
    plan: Plan
    checkpoint: Checkpoint
    proof: Proof
    previews: Image.Image
    trained: int


def execute(request: Request, progress: Progress) -> Result:
    """Train what is not trained yet, and return what there is then.

    Raises ValueError, OSError or MemoryError with one sentence before anything is encoded when an input cannot work,
    and ComfyUI's interrupt on cancel, after the last finished step has been saved.
    """
    progress.phase("Checking the inputs")
    job = prepared(request)
    before = job.run.step
    progress.live.plan(str(job.plan))
    progress.live.opened(job.run, job.plan.train.steps)
    previews = Previews(job)
    if before < job.plan.train.steps:
        check_disk(job)
        job.encoder.check(job.denoiser.family.title, job.denoiser.context_width, job.denoiser.pooled_width)
        job = session.trained(job, previews, progress)
    steps = job.plan.train.steps
    checkpoints = _checkpoints(job, progress)
    shown = [entry for entry in checkpoints if session.is_shown(entry, job.plan) or previews.has(entry)]
    strip, proof = previews.strip(shown or checkpoints[-1:], progress), proved(job, checkpoints[-1])
    # After the strip, so that the newest file has its cover: the average says the same of itself.
    if mean := job.run.average_of_last(job.plan.average_last, up_to=steps):
        proved(job, mean)
        write_words(job, mean)
    write_report(job, previews, proof)
    return Result(job.run, job.plan, checkpoints[-1], proof, strip, job.run.step - before)


def prepared(request: Request) -> Job:
    """The request as a job, its run opened; ValueError with one sentence for what cannot be trained."""
    settings = request.settings
    request = replace(request, dataset=with_class_words(request.dataset, settings.class_words))
    dataset = request.dataset
    if not dataset.concepts:
        raise ValueError(f"The dataset '{dataset.folder}' has no picture to train on: add some, or hold out fewer.")
    pictures, batches = epoch_of(dataset, max(1, settings.batch_size))
    chosen = plan(
        request.preset,
        len(dataset.concepts),
        settings,
        steps=request.steps,
        learning_rate=request.learning_rate,
        rank=request.rank,
        save_every=request.save_every,
        seed=request.seed,
        regularization=dataset.regularization_a_round,
        fill=pictures / batches,
    )
    chosen = replace(chosen, notes=(*chosen.notes, *notes_on_pictures(dataset, chosen.train)))
    wanted, text = chosen.train.text, None
    if wanted.encoder_rate or wanted.new_tokens:
        words = new_words(dataset.concepts) if wanted.new_tokens else {}
        text = TrainedText(request.clip, wanted, words, request.seed)
    if request.start_from:
        check_fit(request.model, request.clip, folders.lora_path(request.start_from), chosen.lora.kind)
    denoiser = LoadedModel(request.model, text)
    networks = [(part.network, part.prefix) for part in _parts(denoiser, text)]
    chosen = replace(chosen, notes=(*chosen.notes, *without_effect(networks, chosen.lora, chosen.train.rates)))
    losses.check(chosen.train.objective, denoiser.prediction)
    encoder = GraphEncoder(request.model, request.clip, request.vae, text and text.tokens)
    identity = _identity(request, chosen, denoiser, encoder)
    run = _opened(request, identity, chosen)
    if text and text.tokens and run.fact(session.WORDS_OF_FILE):
        start_words(text.tokens, read_lora(folders.lora_path(request.start_from)))
    limited = as_fitted(chosen, run, request.stop_after)
    return Job(request, limited or chosen, denoiser, text, encoder, run, was_fitted=limited is not None)


def _parts(denoiser: LoadedModel, text: TrainedText | None) -> list[Part]:
    return [Part(UNET, denoiser.network, denoiser.family.layers), *(text.parts() if text else ())]


def _opened(request: Request, identity: dict[str, object], chosen: Plan) -> TrainingRun:
    """The run to go on with; a new one where the old one would have to begin anew among its own files."""
    place = folders.runs_folder(), folders.loras_folder(), request.name, identity
    run = TrainingRun.open(*place, start_over=request.start_over)
    # A run that was cut to a limit of time is done when it has come that far.
    wanted = (as_fitted(chosen, run, request.stop_after) or chosen).train.steps
    if not run.has_lost_its_state or run.step >= wanted:
        return run
    new = TrainingRun.open(*place, start_over=True)
    new.add_note(
        f"The state of '{run.name}' is gone from '{run.folder}', so it cannot go on from step {run.step}: to begin "
        "with what it learned, choose its newest file in start_from."
    )
    return new


def _identity(request: Request, chosen: Plan, denoiser: LoadedModel, encoder: GraphEncoder) -> dict[str, object]:
    """All that decides the weights: a run is gone on with only when it is the same."""
    dataset = request.dataset
    identity = {
        "model": denoiser.identity,
        "vae": encoder.latents_key,
        "clip": encoder.text_key,
        "dataset": fingerprint(dataset, classes=chosen.train.objective.preservation > 0),
        MASKED: any(example.mask for example in (*dataset.examples, *dataset.held_out)),
        "lora": asdict(chosen.lora),
        "train": chosen.train.identity(),
    }
    if request.start_from:
        # What a file says about itself may change, with a cover or a strength: only its tensors count.
        file = folders.lora_path(request.start_from)
        identity["start_from"] = hashlib.sha256(payload_of(file.read_bytes())).hexdigest()
    if request.stop_after and chosen.train.bends_with_steps:
        # The minutes decide how many steps there are.
        identity["stop_after"] = request.stop_after
    return identity


def _checkpoints(job: Job, progress: Progress) -> tuple[Checkpoint, ...]:
    """The files up to the steps asked for; where none of the run's is left, the newest again, from the state.

    ValueError when there is none to hand on.
    """
    run, steps, trigger = job.run, job.plan.train.steps, job.dataset.trigger_word
    damaged = run.set_aside_damaged()
    notes = [f"The file '{entry.lora_name}' could not be read and is called '….damaged' now." for entry in damaged]
    all_are_gone = not run.checkpoints()
    if run.step <= steps and (all_are_gone or run.step in [entry.step for entry in damaged]):
        gone = "The LoRA files of this run were gone" if all_are_gone else "Its weights were still there"
        notes += [f"{gone}: that of step {e.step} was written again." for e in run.write_again(writer(job))[:1]]
    for note in notes:
        run.add_note(note)
        progress.live.note(note)
    entries = run.result(steps, trigger).entries
    if not entries:
        raise ValueError(_why_none(run, steps))
    return entries


def _why_none(run: TrainingRun, steps: int) -> str:
    """Why a run that is trained far enough has no file to hand on."""
    there = run.checkpoints()
    if there:
        return (
            f"The first checkpoint of the run '{run.name}' is at step {there[0].step}, so there is none within "
            f"{steps} steps: ask for more steps, or set resume to 'start over'."
        )
    gone = f"The files of the run '{run.name}' are gone from '{run.loras / run.name}': "
    if (state.step_of(run.folder) or 0) > steps:
        return f"{gone}ask for {run.step} steps, and that step is written again, or set resume to 'start over'."
    return f"{gone}set resume to 'start over'."
