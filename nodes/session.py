"""One training, from the first picture encoded to the last file written: what goes around `train()`.

Encode, load, try a step, then

    train -> enduring -> in time -> watched -> recorded -> validated -> what is shown

where each stage passes the events of the one before on.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..training import spoiling
from ..training.batches import Batch, Batches, largest, load
from ..training.cache import Cached, CachedDataset, encode
from ..training.checkpoint import Checkpoint, mean_of
from ..training.dataset import TRAIN
from ..training.endurance import enduring
from ..training.loop import Snapshot, Step, add_gradients, train
from ..training.lora import Adapters
from ..training.memory import EVERY_BLOCK, EVERY_SECOND_BLOCK, NO_BLOCK, RECOMPUTE, RESIDENT
from ..training.objective import Objective
from ..training.presets import AUTOMATIC, EVERY_SECOND, OFF, ON, Plan
from ..training.recording import recorded, validated
from ..training.timesteps import VALIDATION_PLACES
from ..training.validation import validation_loss
from .host import folders
from .host.controls import Controls
from .host.memory import OUT_OF_MEMORY, Measured, choices_for, give_back_memory, needs_of, preflight
from .host.progress import Cancelled, Progress, watched
from .host.warm_start import warm_start
from .lora_writer import proved, writer
from .previews import Previews
from .time_limit import fitted_to, in_time

if TYPE_CHECKING:
    from .job import Job

RECOMPUTED = {
    AUTOMATIC: RECOMPUTE,
    ON: (EVERY_BLOCK,),
    OFF: (NO_BLOCK,),
    EVERY_SECOND: (EVERY_SECOND_BLOCK,),
}
WORDS_OF_FILE = "words_of_file"
_GIB = 1024**3


def trained(job: Job, previews: Previews, progress: Progress) -> Job:
    """Train what is left of the job, and return it with the plan that it came to.

    Raises what `execute` does; what was trained until then is saved.
    """
    with Controls(progress.node_id, progress.live.touched) as asked:
        cached = encode(
            job.dataset,
            job.encoder,
            folders.cache_folder(),
            progress.encoding,
            classes=job.plan.train.objective.preservation > 0,
        )
        previews.encode_prompts(progress)
        return _trained(job, previews, cached, asked, progress)


def _trained(job: Job, previews: Previews, cached: CachedDataset, asked: Controls, progress: Progress) -> Job:
    """The training itself, with all that it needs encoded."""
    # ComfyUI runs nodes in inference mode, where nothing that is made can be trained.
    with torch.inference_mode(False):
        training = Training(job, cached.examples, [load([picture]) for picture in cached.held_out], asked, progress)
        training.try_out()
        previews.show_baseline(progress)
        training.fit(previews)
        for event in training.events(previews):
            if isinstance(event, Checkpoint):
                proved(training.job, event)
                if is_shown(event, training.job.plan):
                    previews.show(event, progress)
            elif asked.take("preview"):
                previews.show_unsaved(event.snapshot(), writer(training.job), progress)
    return training.job


class Training:
    """The adapters of a job, and the network they are on, from the trial step to the last."""

    def __init__(
        self, job: Job, examples: Sequence[Cached], held_out: list[Batch], asked: Controls, progress: Progress
    ) -> None:
        self.job, self._held_out, self._asked, self._progress = job, held_out, asked, progress
        self._batches = Batches(examples, job.plan.train.batch_size, job.plan.train.seed)
        self._largest = largest(examples, job.plan.train.batch_size)
        concepts = [picture for picture in examples if picture.example.role == TRAIN]
        self._known = [load([picture]) for picture in concepts[: spoiling.PICTURES]]
        text = job.text
        self._ready, self._level_by_level = True, False
        self._adapters = Adapters.build(job.parts, job.plan.lora, job.plan.train.seed, text.extra() if text else ())

    def try_out(self) -> None:
        """Settle on a memory plan by computing one step, and ask the untrained model about the held-out pictures."""
        job, config = self.job, self.job.plan.train
        self._progress.phase("Trying a step")
        settings = job.request.settings
        choices = choices_for(job.denoiser.patcher, config.batch_size, RECOMPUTED[settings.checkpointing])
        if settings.offload >= 0 and choices.resident == RESIDENT:
            choices = replace(choices, resident=(1 - settings.offload,))
        self._choices = choices
        values, size = self._adapters.values.numel(), self._largest.size
        needs = needs_of(job.denoiser, values, size, config.batch_size, config.optimizer, averaged=config.ema > 0)
        self._measured = preflight(job.denoiser, self._adapters, self._one_step, choices, needs)
        self._memory = self._measured.plan
        self._say(self._measured)
        job.run.note(
            settings=str(job.plan),
            planned=config.steps,
            held_out=[example.path.name for example in job.dataset.held_out],
        )
        if self._held_out and job.run.base_validation is None:
            started = time.perf_counter()
            job.run.note_validation(0, self._validation())
            job.run.note(seconds_per_validation=time.perf_counter() - started)
        if job.run.step == 0 and config.steps >= spoiling.CHECKED_AT[0] and not job.request.start_from:
            started = time.perf_counter()
            job.run.note(first_losses=self._losses_as_trained())
            job.run.note(seconds_per_check=time.perf_counter() - started)
        self._progress.live.opened(job.run, config.steps)

    def fit(self, previews: Previews) -> None:
        """Where there is a limit of time, choose as many steps as fit into it; a run keeps what it came to."""
        minutes, run = self.job.request.stop_after, self.job.run
        if not minutes or self.job.was_fitted:
            return
        if previews.seconds:
            run.note(seconds_per_preview=previews.seconds)
        # A step is its passes over the batches; the optimizer takes next to nothing beside them.
        chosen = fitted_to(minutes, self.job.plan, run, self._measured.seconds * self.job.plan.train.accumulation)
        self.job = replace(self.job, plan=chosen)
        self._progress.live.plan(str(chosen))
        self._progress.live.opened(run, chosen.train.steps)

    def events(self, previews: Previews) -> Iterator[Step | Checkpoint]:
        """Every step and every file, as they come."""

        def went_back(step: int, slowdown: float) -> None:
            run.back_to(step, slowdown)
            previews.forget(after=step)
            self._progress.live.back_to(step)

        job, run, plan = self.job, self.job.run, self.job.plan
        resume = run.resume() or self._first()
        events = enduring(
            self._begin,
            resume,
            before=run.resume_before(resume.step),
            spoilt=self._spoilt,
            slowdown=run.slowdown,
            out_of_memory=OUT_OF_MEMORY,
            step_down=self._step_down,
            paused=self._asked.paused,
            wait=self._pause,
            note=self._note,
            went_back=went_back,
        )
        if job.request.stop_after:
            events = in_time(events, job.request.stop_after, plan.train.steps, self._clock, self._note)
        events = watched(events, self._progress, plan.train.steps, self._asked)
        events = recorded(
            events,
            run,
            writer(job),
            save_every=plan.save_every,
            last_step=plan.train.steps,
            asked=lambda: self._asked.take("save"),
            clock=self._clock,
        )
        if not self._held_out:
            return events
        live = self._progress.live
        return validated(
            events,
            run,
            self._validation,
            self._adapters,
            every=plan.validate_every,
            interrupt=Cancelled,
            ready=lambda: self._ready,
            told=lambda step, values: live.validation(step, mean_of(values)),
        )

    def _clock(self) -> float:
        """Seconds, without those of pauses."""
        return time.perf_counter() - self._asked.waited

    def _begin(self, resume: Snapshot, slowdown: float) -> Iterator[Step]:
        self.job.denoiser.prepare(self._adapters, self._memory, self._measured.needs)
        self._ready = True
        return train(self.job.denoiser, self._batches, self._adapters, self.job.plan.train, resume, slowdown)

    def _first(self) -> Snapshot:
        """What training begins with: fresh adapters, or those of a LoRA file."""
        name = self.job.request.start_from
        if name:
            request, file, text = self.job.request, folders.lora_path(name), self.job.text
            tokens = text.tokens if text else None
            if tokens is not None:
                # Known before the first state, in which a word is a direction from what it began as.
                self.job.run.remember(**{WORDS_OF_FILE: True})
            self._note(warm_start(self._adapters, request.model, request.clip, file, tokens))
        return Snapshot(0, self._adapters.state(), {})

    def _one_step(self) -> None:
        """The gradients of the largest batch."""
        config = self.job.plan.train
        objective = Objective(config.objective, config.seed)
        add_gradients(self.job.denoiser, objective, self._adapters, self._largest, 0, share=1.0)

    def _validation(self) -> list[list[float]]:
        """Loss per picture and noise level, one level at a time once all of them together took too much memory."""
        ask = partial(validation_loss, self.job.denoiser, self._held_out, self.job.plan.train.objective.mask_floor)
        if not self._level_by_level:
            try:
                return ask()
            except OUT_OF_MEMORY:
                self._level_by_level = True
            # Only here, outside the handler, is what was asked really gone.
            give_back_memory()
        apart = [ask(levels=[place]) for place in VALIDATION_PLACES]
        return [sum(levels, []) for levels in zip(*apart, strict=True)]

    def _spoilt(self, step: int) -> str:
        before = self.job.run.fact("first_losses")
        if before is None or step not in spoiling.CHECKED_AT:
            return ""
        return spoiling.spoilt(self._losses_as_trained(), before)

    def _losses_as_trained(self) -> list[float]:
        return spoiling.losses_of(self.job.denoiser, self._known, self.job.plan.train)

    def _step_down(self) -> str | None:
        step = self._choices.stepped_down(self._memory)
        if step is None:
            return None
        self._memory, moved = step
        return moved

    def _pause(self, state: Snapshot | None) -> None:
        """Everything off the device until the user goes on, and on the disk what would be lost if that never came."""
        if state is not None and (state.step != self.job.run.step or self.job.run.went_back):
            self.job.run.keep(state)
        self._progress.phase("Freeing the memory")
        self.job.denoiser.release()
        self._ready = False
        self._asked.wait()
        self._progress.phase("Loading the model")

    def _note(self, text: str) -> None:
        self.job.run.add_note(text)
        self._progress.live.note(text)

    def _say(self, measured: Measured) -> None:
        for note in measured.notes:
            self._note(note)
        seconds = measured.seconds * self.job.plan.train.accumulation
        left = self.job.plan.train.steps - self.job.run.step
        memory = f"{measured.plan}, {measured.peak_bytes / _GIB:.1f} GB of {measured.free_bytes / _GIB:.1f} GB free"
        self.job.run.note(memory=memory)
        self._progress.live.plan(
            f"{self.job.plan}\nMemory: {memory}. About {seconds:.2g} s a step, {seconds * left / 60:.0f} minutes."
        )


def is_shown(checkpoint: Checkpoint, plan: Plan) -> bool:
    """Whether previews of this file are drawn without being asked for."""
    return not checkpoint.average and (checkpoint.step % plan.preview_every == 0 or checkpoint.step >= plan.train.steps)
