"""How a state of a training becomes files: a LoRA, the embeddings of its new words, and the proof that it loads."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file

from ..training import lora_file
from ..training.checkpoint import Checkpoint
from ..training.description import description
from ..training.embeddings import bundled, unbundled
from ..training.loop import Snapshot
from ..training.run import WriteLora
from .host.proof import Proof, prove

if TYPE_CHECKING:
    from .job import Job

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def writer(job: Job) -> WriteLora:
    """How a snapshot of this job becomes a LoRA file, and the embeddings that go with it."""

    def write(path: Path, snapshot: Snapshot, average: str = "") -> None:
        dtype = DTYPES[job.request.settings.save_precision]
        tensors = lora_file.file_tensors(snapshot.weights, job.plan.lora, dtype)
        if job.text is not None and job.text.tokens is not None:
            tensors |= bundled(job.text.tokens.rows(snapshot.weights))
            job.text.tokens.write(lora_name(job, path), snapshot.weights)
        lora_file.write(path, tensors, _described(job, snapshot.step, average))

    return write


def write_words(job: Job, checkpoint: Checkpoint) -> None:
    """Write the embeddings that a LoRA file holds beside it, where prompts can name them."""
    if job.text is not None and job.text.tokens is not None:
        job.text.tokens.write_rows(checkpoint.lora_name, unbundled(load_file(checkpoint.path)))


def lora_name(job: Job, path: Path) -> str:
    """A file's name in ComfyUI's list of LoRAs; one that lies elsewhere is called as if it lay in the run's folder."""
    folder = job.run.loras
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(Path(job.run.name) / path.name)


def _described(job: Job, step: int, average: str) -> dict[str, str]:
    request, dataset, identity = job.request, job.dataset, job.run.fact("identity")
    return description(
        title=request.name.strip(),
        family=job.denoiser.family,
        prediction=job.denoiser.prediction,
        lora=job.plan.lora,
        config=job.plan.train,
        triggers=Counter(example.trigger_word for example in dataset.concepts if example.trigger_word),
        resolution=dataset.resolution,
        captions=[example.caption for example in dataset.concepts],
        step=step,
        regularization=len(dataset.examples) - len(dataset.concepts),
        held_out=len(dataset.held_out),
        average=average,
        settings={"save_every": job.plan.save_every, "preset": request.preset, "expert": asdict(request.settings)},
        dataset=identity["dataset"],
        base_model=identity["model"],
        workflow=request.graph.needed(),
        node=request.graph.node,
    )


def proved(job: Job, checkpoint: Checkpoint) -> Proof:
    """The proof of a written file; a file that ComfyUI loads only in part, or not at all, is an error."""
    proof = prove(job.request.model, Path(checkpoint.path), job.request.clip)
    if proof.matched != proof.layers or not proof.layers:
        raise ValueError(f"'{os.path.basename(checkpoint.path)}' is {proof}: please report this with the file.")
    return proof
