import comfy.model_management as mm
import comfy.utils
import pytest

from lora_workbench.nodes.host import controls
from lora_workbench.nodes.host.controls import Controls
from lora_workbench.nodes.host.progress import Progress, throw_if_cancelled, training_line, watched
from lora_workbench.training.loop import Step

pytestmark = pytest.mark.comfy


def steps(count, start=0):
    for number in range(start + 1, start + count + 1):
        yield Step(number, float(number), 1e-4, False)


def watched_on(node_id, some, total):
    """The steps as they come through with the controls of a node open."""
    with Controls(node_id) as requests:
        yield from watched(some, Progress(node_id), total, requests)


def test_steps_pass_through_unchanged_and_in_order():
    assert [step.number for step in watched_on(None, steps(5), 5)] == [1, 2, 3, 4, 5]


def test_cancel_stops_after_the_step_that_is_done():
    seen = []
    with pytest.raises(mm.InterruptProcessingException):
        for step in watched_on(None, steps(5), 5):
            seen.append(step.number)
            if step.number == 2:
                mm.interrupt_current_processing(True)
    assert seen == [1, 2]
    throw_if_cancelled()  # one press stops one run


def test_finish_now_ends_the_steps_without_an_error():
    seen = []
    for step in watched_on("7", steps(5), 5):
        seen.append(step.number)
        if step.number == 3:
            controls.ask("7", "finish")
    assert seen == [1, 2, 3]


def test_a_request_to_finish_is_for_one_run_of_one_node():
    seen = []
    with Controls("7"):
        for step in watched_on("9", steps(3), 3):
            seen.append(step.number)
            controls.ask("7", "finish")
    assert seen == [1, 2, 3]
    assert len(list(watched_on("7", steps(3), 3))) == 3, "pressed before this run began"


def test_the_bar_moves_with_the_steps_and_a_resumed_run_starts_where_it_is(monkeypatch):
    calls = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda value, total, preview, **_: calls.append((value, total))
    )
    list(watched_on("7", steps(3, start=10), 20))
    assert calls[0] == (11, 20) and set(calls) <= {(11, 20), (12, 20), (13, 20)}  # ComfyUI drops what comes too fast


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((10, 100, 0.5, 0.12345), "Training: step 10 of 100 · 0.50 s/step · 0:45 left · loss 0.1235"),
        ((1, 7201, 1.0, 1.0), "Training: step 1 of 7201 · 1.00 s/step · 2:00:00 left · loss 1.0000"),
        ((1, 3, 2.0, None), "Training: step 1 of 3 · 2.00 s/step · 0:04 left · no finite loss yet"),
    ],
)
def test_the_line_says_step_speed_time_left_and_loss(arguments, line):
    assert training_line(*arguments) == line
