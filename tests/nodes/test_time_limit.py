"""How many steps fit into a limit of time, and that it is kept."""

import pytest

from lora_workbench.nodes.time_limit import as_fitted, fitted_to, in_time
from lora_workbench.training.loop import Step
from lora_workbench.training.presets import ExpertSettings, plan
from lora_workbench.training.run import TrainingRun

WHOLE = plan("object", 12, ExpertSettings(), steps=1000)


@pytest.fixture
def run(tmp_path) -> TrainingRun:
    return TrainingRun.open(tmp_path / "runs", tmp_path / "loras", "star", {})


def test_looking_whether_the_model_is_spoilt_counts_as_often_as_it_is_done(run):
    run.note(seconds_per_check=30.0)
    assert fitted_to(20, WHOLE, run, 2.0).train.steps == (20 * 60 - 4 * 30) // 2
    assert fitted_to(1, WHOLE, run, 2.0).train.steps == (60 - 30) // 2
    assert fitted_to(1, WHOLE, run, 7.0).train.steps == 60 // 7


def test_what_was_fitted_is_kept_for_the_same_wishes_alone(run):
    fitted = fitted_to(20, WHOLE, run, 2.0)
    assert as_fitted(WHOLE, run, 20) == fitted and as_fitted(WHOLE, run, 21) is as_fitted(WHOLE, run, 0) is None


@pytest.mark.parametrize(("seconds", "passed"), [(6.0, 10), (6.5, 10), (6.7, 10), (7.4, 9), (13.0, 6)])
def test_a_training_ends_a_tenth_over_its_limit_and_says_so(seconds, passed):
    now, notes = 0.0, []

    def steps():
        nonlocal now
        for number in range(1, 11):
            now += seconds
            yield Step(number, 0.1, 1e-4, False)

    assert len(list(in_time(steps(), 1, 10, lambda: now, notes.append))) == passed
    assert [note.partition(":")[0] for note in notes] == (
        [f"The 1 minutes of stop_after were over at step {passed} of 10"] if passed < 10 else []
    )
