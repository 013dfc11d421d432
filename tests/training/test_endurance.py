"""Training that goes back, steps down and pauses, and still ends where an undisturbed one does."""

import gc
import math
import random
import weakref
from contextlib import closing

import pytest
import torch
from toys import Batches, Denoiser, equal

from lora_workbench.training.config import TrainConfig
from lora_workbench.training.endurance import KEPT_EVERY, Watch, enduring
from lora_workbench.training.loop import Snapshot, State, Step, train

RATE = 0.01


class OutOfMemory(RuntimeError):
    pass


class Training:
    """A toy training that can be begun again, and what it was begun with."""

    denoiser = Denoiser

    def __init__(self, steps=8, batches=None, **settings):
        self.config = TrainConfig(steps=steps, learning_rate=RATE, **settings)
        self.batches, self.begun, self.notes = batches or Batches(), [], []

    def begin(self, state, slowdown):
        self.begun.append((state.step if state else 0, slowdown))
        denoiser = self.denoiser()
        yield from train(denoiser, self.batches, denoiser.adapters, self.config, state, slowdown)

    def steps(self, resume=None, **options):
        return enduring(self.begin, resume, note=self.notes.append, **options)

    def end(self, **options):
        for step in self.steps(**options):
            snapshot = step.snapshot()
        return snapshot


def same(one, other):
    assert one.step == other.step
    assert equal(one.weights, other.weights) and equal(one.optimizer, other.optimizer)
    assert (one.ema is None) == (other.ema is None) and (one.ema is None or equal(one.ema, other.ema))


def once(*numbers):
    """A function that is true when it is asked for the n-th time."""
    asked = iter(range(10**6))
    return lambda: next(asked) in numbers


def test_without_trouble_it_is_training_itself():
    training = Training(ema=0.9)
    denoiser = Denoiser()
    plain = list(train(denoiser, Batches(), denoiser.adapters, training.config))
    steps = list(training.steps())
    assert [(step.number, step.loss, step.norm) for step in steps] == [(s.number, s.loss, s.norm) for s in plain]
    same(steps[-1].snapshot(), plain[-1].snapshot())
    assert training.begun == [(0, 1.0)] and training.notes == []


# Memory


class Tight(Batches):
    """Batches that exhaust the memory at some of their numbers, once each."""

    def __init__(self, *numbers):
        super().__init__()
        self.left = set(numbers)

    def __getitem__(self, number):
        if number in self.left:
            self.left.discard(number)
            raise OutOfMemory("CUDA out of memory")
        return super().__getitem__(number)


@pytest.mark.parametrize("settings", [{}, {"accumulation": 2, "ema": 0.9}, {"optimizer": "schedule-free"}])
@pytest.mark.parametrize("numbers", [(0,), (5,), (3, 6)])
def test_out_of_memory_turns_a_knob_and_goes_on_from_the_last_step_to_the_same_end(settings, numbers):
    knobs = iter(("batches go through in 2 parts", "blocks are recomputed"))
    training = Training(batches=Tight(*numbers), **settings)
    end = training.end(out_of_memory=(OutOfMemory,), step_down=lambda: next(knobs))
    same(end, Training(**settings).end())
    done = [number // training.config.accumulation for number in numbers]
    assert training.begun == [(0, 1.0), *((step, 1.0) for step in done)]
    assert training.notes[0] == (
        f"Step {done[0]}: memory ran out; batches go through in 2 parts. Training went on from there."
    )


def test_the_memory_of_the_failed_step_is_free_before_the_knob_is_turned():
    activations, left = [], []

    class Holding(Batches):
        def __getitem__(self, number):
            if number == 3 and not activations:
                held = torch.zeros(10)
                activations.append(weakref.ref(held))
                raise OutOfMemory
            return super().__getitem__(number)

    training = Training(batches=Holding())
    gc.disable()
    try:
        training.end(out_of_memory=(OutOfMemory,), step_down=lambda: left.append(activations[0]()) or "x")
    finally:
        gc.enable()
    assert left == [None]


def test_when_nothing_is_left_to_turn_down_it_ends_with_a_sentence_and_the_last_step_can_be_saved():
    last = None
    with pytest.raises(MemoryError, match=r"^The memory of the device ran out after step 3, .*resolution.*\.$"):
        for step in Training(batches=Tight(3)).steps(out_of_memory=(OutOfMemory,)):
            last = step
    same(last.snapshot(), [step.snapshot() for step in Training().steps()][2])


def test_memory_that_runs_out_while_the_state_changes_loses_no_step(monkeypatch):
    """The step is half done then; it is taken again from the newest state that was kept."""
    failing = once(KEPT_EVERY + 3)
    step = torch.optim.AdamW.step

    def tight(self, *arguments):
        result = step(self, *arguments)
        if failing():
            raise OutOfMemory
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", tight)
    training = Training(steps=KEPT_EVERY + 6)
    end = training.end(out_of_memory=(OutOfMemory,), step_down=lambda: "x")
    monkeypatch.undo()
    same(end, Training(steps=KEPT_EVERY + 6).end())
    assert training.begun == [(0, 1.0), (KEPT_EVERY, 1.0)]


def test_other_errors_are_not_survived():
    with pytest.raises(OutOfMemory):
        Training(batches=Tight(2)).end()


# Pause


@pytest.mark.parametrize(
    "settings", [{}, {"optimizer": "lion", "ema": 0.9}, {"schedule": "cosine", "warmup": 0.5, "accumulation": 2}]
)
def test_a_pause_changes_nothing_and_lets_the_memory_go(settings):
    training, alive = Training(**settings), []
    begin = training.begin

    def watched(state, slowdown):
        steps = begin(state, slowdown)
        alive.append(weakref.ref(steps))
        return steps

    training.begin = watched
    waits = []

    def wait(state):
        gc.collect()
        waits.append((alive[-1](), state.step))

    end = training.end(paused=once(2, 5), wait=wait)
    same(end, Training(**settings).end())
    assert waits == [(None, 3), (None, 6)]
    assert [start for start, _ in training.begun] == [0, 3, 6] and training.notes == []


def test_a_cancel_during_a_pause_leaves_the_last_step_to_be_saved():
    class Cancel(BaseException):
        pass

    def cancel(_):
        raise Cancel

    last = None
    with pytest.raises(Cancel):
        for step in Training().steps(paused=once(3), wait=cancel):
            last = step
    assert last.snapshot().step == 4


# Going back


def test_three_steps_that_are_not_finite_go_back_to_a_good_state_at_half_the_rate():
    first = KEPT_EVERY + 10
    training = Training(steps=2 * KEPT_EVERY, batches=_BrokenOnce(first, first + 1, first + 2))
    back = []
    steps = list(training.steps(went_back=lambda *told: back.append(told)))
    assert training.begun == [(0, 1.0), (0, 0.5)] and back == [(0, 0.5)]
    assert [step.number for step in steps] == [*range(1, first + 3), *range(1, 2 * KEPT_EVERY + 1)]
    assert {step.learning_rate for step in steps[first + 2 :]} == {RATE / 2}
    assert len(training.notes) == 1 and "\n" not in training.notes[0]
    assert training.notes[0].startswith(f"Step {first + 2}: The loss was not a finite number for 3 steps in a row")
    assert training.notes[0].endswith("Training went back to step 0 and goes on at 0.5 times the learning rate.")


class _BrokenOnce(Batches):
    """Batches that are broken the first time they are asked for."""

    def __init__(self, *numbers):
        super().__init__(broken=set(numbers))

    def __getitem__(self, number):
        batch = super().__getitem__(number)
        self.broken.discard(number)
        return batch


def test_it_goes_back_to_the_older_of_two_states():
    first = 3 * KEPT_EVERY + 5
    training = Training(steps=first + 5, batches=_BrokenOnce(first, first + 1, first + 2))
    end = training.end()
    assert training.begun == [(0, 1.0), (2 * KEPT_EVERY, 0.5)]

    plain = Training(steps=first + 5)
    states = [step.snapshot() for step in plain.steps() if step.number == 2 * KEPT_EVERY]
    denoiser = Denoiser()
    *_, reference = train(denoiser, Batches(), denoiser.adapters, plain.config, states[0], slowdown=0.5)
    same(end, reference.snapshot())


def test_right_after_going_back_a_cancel_saves_the_good_state_and_not_the_bad_one():
    first, last = 2 * KEPT_EVERY, None
    training = Training(steps=first + 5, batches=_BrokenOnce(first, first + 1, first + 2))

    def cancelled(step, slowdown):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        for step in training.steps(went_back=cancelled):
            last = step
    assert (last.number, last.snapshot().step) == (first + 2, KEPT_EVERY)


def test_right_after_going_back_to_the_beginning_there_is_nothing_to_save():
    last = None

    def cancelled(step, slowdown):
        raise KeyboardInterrupt

    training = Training(batches=_BrokenOnce(4, 5, 6))
    with pytest.raises(KeyboardInterrupt):
        for step in training.steps(resume=Snapshot(0, Denoiser().adapters.state(), {}), went_back=cancelled):
            last = step
    with pytest.raises(RuntimeError, match="but the beginning"):
        last.snapshot()


def test_after_three_times_it_stops_with_one_sentence():
    training, steps = Training(batches=Batches(broken=(4, 5, 6))), []
    with pytest.raises(FloatingPointError) as error:
        for step in training.steps():
            steps.append(step)
    assert [slowdown for _, slowdown in training.begun] == [1.0, 0.5, 0.25, 0.125]
    assert len(training.notes) == 3
    sentence = str(error.value)
    assert sentence.startswith("Training stopped at step 6, though the learning rate was halved 3 times. The loss was")
    assert sentence.endswith(".") and "\n" not in sentence


def test_a_run_that_was_slowed_down_goes_on_slowly_and_counts_on():
    training = Training(batches=Batches(broken=(4, 5, 6)))
    with pytest.raises(FloatingPointError):
        list(training.steps(slowdown=0.25))
    assert [slowdown for _, slowdown in training.begun] == [0.25, 0.125]


def test_a_network_that_is_spoilt_is_given_back_as_it_was_at_half_the_rate():
    training, asked = Training(steps=12), []

    def spoilt(step):
        asked.append(step)
        return "It is spoilt." if asked.count(10) == 1 and step == 10 else ""

    list(training.steps(spoilt=spoilt))
    assert training.begun == [(0, 1.0), (0, 0.5)] and asked == [*range(1, 11), *range(1, 13)]
    assert training.notes == [
        "Step 9: It is spoilt. Training went back to step 0 and goes on at 0.5 times the learning rate."
    ]


def test_a_run_goes_back_to_the_state_it_went_on_from_and_in_vain_to_the_one_before():
    plain = Training(steps=20)
    states = {step.number: step.snapshot() for step in plain.steps()}
    once = Training(steps=30, batches=_BrokenOnce(20, 21, 22))
    list(once.steps(resume=states[20], before=states[10]))
    assert once.begun == [(20, 1.0), (20, 0.5)]
    always = Training(steps=30, batches=Batches(broken={20, 21, 22}))
    with pytest.raises(FloatingPointError):
        list(always.steps(resume=states[20], before=states[10]))
    assert always.begun == [(20, 1.0), (20, 0.5), (10, 0.25), (10, 0.125)]


class Cliff(Denoiser):
    """Its answers become worse and worse once the adapters lie on one side."""

    def __call__(self, *question):
        return super().__call__(*question) + 20 * torch.relu(self.adapters.values.detach().mean() - 0.05)


def test_a_training_that_really_diverges_is_brought_back(monkeypatch):
    """The adapters are pushed off a cliff in the middle; what comes after must be as good as before."""
    change, at, back = State.change, 3 * KEPT_EVERY + 20, []

    def pushed(self, step):
        change(self, step)
        if step >= at and not back:
            self.adapters.values.data.add_(0.02)

    monkeypatch.setattr(State, "change", pushed)
    training = Training(steps=5 * KEPT_EVERY)
    training.denoiser = Cliff
    steps = list(training.steps(went_back=lambda *told: back.append(told)))
    assert [where for where, _ in back] in ([2 * KEPT_EVERY], [3 * KEPT_EVERY])
    assert "times what it was" in training.notes[0] and len(training.notes) == 1
    assert at < max(step.number for step in steps[: -3 * KEPT_EVERY]) <= at + 80
    before, after = ([step.loss for step in steps if at - 40 <= step.number < at], [s.loss for s in steps[-40:]])
    assert sum(after) < 1.1 * sum(before)


# The watch


def curve(rng, steps, *, batch=1, noise=0.5, tails=None, drop=0.3, kinds=0.0, span=4.0, warm=0):
    """Losses as trainings have them: by noise level over `span` in the logarithm, by picture, and noise on top."""
    draw = {None: lambda: rng.gauss(0, noise), "laplace": lambda: rng.expovariate(1 / noise) * rng.choice((-1, 1))}
    draw["outliers"] = lambda: rng.gauss(0, noise) + (4 if rng.random() < 0.02 else 0)
    made = draw[tails]
    for number in range(1, steps + 1):
        fall = drop * (1 - math.exp(-number / 300))
        sigmas = [rng.random() for _ in range(batch)]
        losses = [
            math.exp(-span * sigma + rng.choice((0, kinds)) - fall + made() + (0.1 if number < warm else 0))
            for sigma in sigmas
        ]
        yield Step(number, sum(losses) / batch, RATE, False, 1.0, tuple(sigmas), tuple(losses))


def alarm(steps):
    """The step at which the watch speaks up, or None."""
    watch = Watch()
    return next((step.number for step in steps if watch.trouble(step)), None)


HEALTHY = [
    {},
    {"noise": 0.25, "batch": 2},
    {"noise": 0.9},
    {"tails": "laplace"},
    {"tails": "outliers"},
    {"kinds": 2.0},
    {"noise": 0.05, "batch": 3, "span": 6.0},
    {"drop": 0.0, "warm": 50},
]


@pytest.mark.parametrize("look", HEALTHY, ids=str)
def test_ordinary_noise_never_raises_an_alarm(look):
    """25 curves of 600 steps of each look, 200 in all."""
    assert [alarm(curve(random.Random(seed), 600, **look)) for seed in range(25)] == [None] * 25


def risen(steps, start, double):
    """The curve with losses that double every so many steps from a step on."""
    for step in steps:
        factor = 2 ** (max(0, step.number - start) / double)
        yield Step(step.number, 0, RATE, False, 1.0, step.sigmas, tuple(loss * factor for loss in step.losses))


@pytest.mark.parametrize("look", HEALTHY, ids=str)
@pytest.mark.parametrize(("start", "double", "within"), [(300, 25, 200), (300, 1, 75), (20, 1, 30)])
def test_a_loss_that_runs_away_is_noticed(look, start, double, within):
    alarms = [alarm(risen(curve(random.Random(seed), 600, **look), start, double)) for seed in range(5)]
    assert all(found is not None and start < found <= start + within for found in alarms), alarms


@pytest.mark.parametrize("stop", [30, 260, 431, 470])
@pytest.mark.parametrize("look", [{}, {"batch": 64}], ids=str)
def test_a_run_that_was_stopped_is_watched_as_if_it_never_had_been(look, stop):
    """Also where the loss had begun to run away already."""
    steps = list(risen(curve(random.Random(1), 520, **look), 425, 10))
    whole, first = Watch(), Watch()
    for step in steps[:stop]:
        first.trouble(step)
    second = Watch(first.recent(stop))
    told = [whole.trouble(step) for step in steps]
    assert [second.trouble(step) for step in steps[stop:]] == told[stop:] and any(told[stop:])
    assert torch.equal(second.recent(520)["points"], whole.recent(520)["points"])
    assert len(second.recent(520)["points"]) <= 2000 + 150 * look.get("batch", 1)


def test_steps_without_a_finite_loss_and_pictures_that_count_nothing_are_left_out():
    watch = Watch()
    for number in range(1, 200):
        broken = number % 3 == 0
        losses = (math.nan if broken else 0.1, math.nan if broken else 0.0)
        assert watch.trouble(Step(number, losses[0], RATE, broken, 1.0, (1.0, 2.0), losses)) == ""


def test_steps_can_be_closed_at_any_time():
    training = Training()
    with closing(training.steps()) as steps:
        next(steps)
    assert training.notes == []
