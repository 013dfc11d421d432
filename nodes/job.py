"""One queueing of the Trainer: what is checked, encoded, trained, written and shown, in that order."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from PIL import Image

from ..training import lora_file
from ..training.batches import Batch, Batches, load
from ..training.cache import CachedDataset, encode, encodings, fingerprint
from ..training.dataset import Dataset
from ..training.description import description
from ..training.loop import Snapshot, Step, train
from ..training.lora import Adapters, Part
from ..training.memory import EVERY_BLOCK, NO_BLOCK, RECOMPUTE
from ..training.presets import AUTOMATIC, OFF, ON, ExpertSettings, Plan, plan
from ..training.run import Checkpoint, TrainingRun, recorded
from ..training.targets import UNET
from ..training.validation import validation_loss
from .host import folders
from .host.controls import Controls
from .host.encoders import GraphEncoder
from .host.graph import Graph
from .host.live import mean_of
from .host.memory import choices_for, free_bytes, needs_of
from .host.model import LoadedModel
from .host.progress import Progress, watched
from .host.proof import Proof, prove
from .previews import Previews

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
RECOMPUTED = {AUTOMATIC: RECOMPUTE, ON: (EVERY_BLOCK,), OFF: (NO_BLOCK,)}
_MIB = 1024**2
LARGEST_LATENTS, LARGEST_TEXT = 2 * _MIB, 4 * _MIB
"""What a cached picture of 1024 x 1024 and its mask take at most, and a cached caption (256 tokens of T5 in fp32)."""


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
    settings: ExpertSettings = field(default_factory=ExpertSettings)
    graph: Graph = field(default_factory=Graph)


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
    dataset = request.dataset
    if not dataset.concepts:
        raise ValueError(f"The dataset '{dataset.folder}' has no picture to train on: add some, or hold out fewer.")
    denoiser = LoadedModel(request.model)
    chosen = plan(
        request.preset,
        denoiser.family,
        len(dataset.concepts),
        request.settings,
        steps=request.steps,
        learning_rate=request.learning_rate,
        rank=request.rank,
        save_every=request.save_every,
        seed=request.seed,
        regularization=len(dataset.examples) - len(dataset.concepts),
    )
    encoder = GraphEncoder(request.model, request.clip, request.vae)
    run = _open_run(request, denoiser, encoder, chosen)
    before = run.step
    progress.live.plan(str(chosen))
    previews = Previews(request, denoiser, run)
    if run.step < chosen.train.steps:
        _check_disk(request, denoiser, chosen, run)
        encoder.check(denoiser.family.title, denoiser.context_width, denoiser.pooled_width)
        _train(request, denoiser, encoder, chosen, run, previews, progress)
    else:
        progress.live.opened(run, chosen.train.steps)
    checkpoints = run.result(chosen.train.steps, dataset.trigger_word).entries
    if not checkpoints:
        raise ValueError(_why_none(run, chosen.train.steps))
    strip = previews.strip(checkpoints, progress)
    return Result(run, chosen, checkpoints[-1], _proved(request, checkpoints[-1]), strip, run.step - before)


def _open_run(request: Request, denoiser: LoadedModel, encoder: GraphEncoder, chosen: Plan) -> TrainingRun:
    """The run to go on with: the same only when everything that decides its weights is the same."""
    identity = {
        "model": denoiser.identity,
        "vae": encoder.latents_key,
        "clip": encoder.text_key,
        "dataset": fingerprint(request.dataset),
        "lora": asdict(chosen.lora),
        "train": chosen.train.identity(),
    }
    runs = folders.output_folder() / "lora_workbench" / "runs"
    return TrainingRun.open(runs, folders.loras_folder(), request.name, identity, start_over=request.start_over)


def _why_none(run: TrainingRun, steps: int) -> str:
    """Why a run that is trained far enough has no file to hand on."""
    there = run.checkpoints()
    if there:
        return (
            f"The first checkpoint of the run '{run.name}' is at step {there[0].step}, so there is none within "
            f"{steps} steps: ask for more steps, or set resume to 'start over'."
        )
    return f"The files of the run '{run.name}' are gone from '{run.loras / run.name}': set resume to 'start over'."


def _check_disk(request: Request, denoiser: LoadedModel, chosen: Plan, run: TrainingRun) -> None:
    """OSError naming the folder that cannot be written, or the space that is missing, before any work is done."""
    adapter_bytes = 4 * chosen.lora.rank * denoiser.adapted_width(chosen.lora)
    files = -(-chosen.train.steps // chosen.save_every) * adapter_bytes // (1 if _is_fp32(request) else 2)
    pictures, texts = encodings(request.dataset)
    cache = pictures * LARGEST_LATENTS + texts * LARGEST_TEXT
    needed = {run.loras: files, run.folder.parent: 3 * adapter_bytes + cache}
    for folder, needed_bytes in needed.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".writable").touch()
            (folder / ".writable").unlink()
        except OSError as error:
            raise OSError(
                f"The folder '{folder}' cannot be written ({error.strerror}): allow writing to it."
            ) from error
        free = shutil.disk_usage(folder).free
        if free < needed_bytes:
            raise OSError(
                f"The disk of '{folder}' has {free // _MIB:,} MB free, but this training writes about "
                f"{needed_bytes // _MIB:,} MB: free some space, or raise save_every."
            )


def _is_fp32(request: Request) -> bool:
    return DTYPES[request.settings.save_precision] == torch.float32


def _train(
    request: Request,
    denoiser: LoadedModel,
    encoder: GraphEncoder,
    chosen: Plan,
    run: TrainingRun,
    previews: Previews,
    progress: Progress,
) -> None:
    """Encode what is not cached, then train; every stage around `train()` is one line here."""
    dataset, config, settings = request.dataset, chosen.train, request.settings
    resolution = max(dataset.all_resolutions)
    cached = encode(dataset, encoder, folders.output_folder() / "lora_workbench" / "cache", progress.encoding)
    previews.encode_prompts(progress)
    progress.phase("Loading the model")
    # ComfyUI runs nodes in inference mode, where nothing that is made can be trained.
    with torch.inference_mode(False):
        parts = [Part(UNET, denoiser.network, denoiser.family.layers)]
        adapters = Adapters.build(parts, chosen.lora, config.seed)
        choices = choices_for(denoiser.patcher, config.batch_size, RECOMPUTED[settings.checkpointing])
        values, size = adapters.values.numel(), (resolution, resolution)
        needs = needs_of(denoiser, values, size, config.batch_size, config.optimizer, averaged=config.ema > 0)
        denoiser.prepare(adapters, choices.fitting(needs, free_bytes(denoiser.patcher)), needs)
        run.note(settings=str(chosen), held_out=[example.path.name for example in dataset.held_out])
        held_out = _one_by_one(cached)
        if held_out and run.base_validation is None:
            run.note_validation(0, validation_loss(denoiser, held_out))
        progress.live.opened(run, config.steps)
        previews.show_baseline(progress)
        batches = Batches(cached.examples, config.batch_size, config.seed)
        asked = Controls(progress.node_id, progress.live.touched)
        with asked, closing(train(denoiser, batches, adapters, config, run.resume())) as steps:
            events = watched(steps, progress, config.steps, asked)
            write = _writer(request, denoiser, chosen, run)
            events = recorded(events, run, write, save_every=chosen.save_every, last_step=config.steps)
            events = validated(events, run, denoiser, held_out, progress)
            for event in events:
                if isinstance(event, Checkpoint):
                    _proved(request, event)
                    previews.show(event, progress)
                elif asked.take("preview"):
                    previews.show_unsaved(event.snapshot(), write, progress)
                asked.wait()


def validated(
    events: Iterable[Step | Checkpoint],
    run: TrainingRun,
    denoiser: LoadedModel,
    held_out: list[Batch],
    progress: Progress,
) -> Iterator[Step | Checkpoint]:
    """Pass events on, and ask the held-out pictures about every checkpoint while its weights are attached."""
    for event in events:
        if isinstance(event, Checkpoint) and held_out:
            losses = validation_loss(denoiser, held_out)
            run.note_validation(event.step, losses)
            progress.live.validation(event.step, mean_of(losses))
        yield event


def _one_by_one(cached: CachedDataset) -> list[Batch]:
    """The held-out pictures, each a batch of its own, in order."""
    return [load([example]) for example in cached.held_out]


def _writer(request: Request, denoiser: LoadedModel, chosen: Plan, run: TrainingRun):
    """How a snapshot of this run becomes a LoRA file."""
    dataset, identity = request.dataset, run.fact("identity")

    def write(path: Path, snapshot: Snapshot, average: str = "") -> None:
        entries = description(
            title=request.name.strip(),
            family=denoiser.family,
            prediction=denoiser.prediction,
            lora=chosen.lora,
            config=chosen.train,
            triggers=Counter(example.trigger_word for example in dataset.concepts if example.trigger_word),
            resolution=dataset.resolution,
            captions=[example.caption for example in dataset.concepts],
            step=snapshot.step,
            regularization=len(dataset.examples) - len(dataset.concepts),
            held_out=len(dataset.held_out),
            average=average,
            settings={"save_every": chosen.save_every, "preset": request.preset, "expert": asdict(request.settings)},
            dataset=identity["dataset"],
            base_model=identity["model"],
            workflow=request.graph.needed(),
            node=request.graph.node,
        )
        tensors = lora_file.file_tensors(snapshot.weights, chosen.lora, DTYPES[request.settings.save_precision])
        lora_file.write(path, tensors, entries)

    return write


def _proved(request: Request, checkpoint: Checkpoint) -> Proof:
    """The proof of a written file; a file that ComfyUI loads only in part, or not at all, is an error."""
    proof = prove(request.model, Path(checkpoint.path))
    if proof.matched != proof.layers or not proof.layers:
        raise ValueError(f"'{os.path.basename(checkpoint.path)}' is {proof}: please report this with the file.")
    return proof
