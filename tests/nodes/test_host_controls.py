import threading

import comfy.model_management as mm
import pytest

from lora_workbench.nodes.host import controls
from lora_workbench.nodes.host.controls import ONCE, Controls, NotPossible

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("action", ONCE)
def test_what_is_asked_once_is_taken_once(action):
    with Controls("7") as asked:
        assert not asked.take(action)
        controls.ask("7", action)
        assert asked.asked() == [action]
        assert asked.take(action) and not asked.take(action)
        assert not any(asked.take(other) for other in ONCE)


def test_requests_reach_the_node_they_name_also_inside_a_subgraph():
    with Controls("2:1") as inside, Controls("1") as outside:
        controls.ask("2:1", "save")
        assert inside.take("save") and not outside.take("save")


def test_a_node_that_is_not_training_is_named_and_nothing_lingers_into_its_next_run():
    for _ in range(2):
        with pytest.raises(NotPossible, match="Node 7 is not training now, so there is nothing to finish"):
            controls.ask("7", "finish")
        with Controls("7") as asked:
            assert asked.asked() == [] and not asked.paused()
            controls.ask("7", "finish")
            controls.ask("7", "pause")
    assert controls.of("7") is None


def test_a_run_that_fails_takes_its_controls_with_it():
    with pytest.raises(RuntimeError), Controls("7"):
        raise RuntimeError
    assert controls.of("7") is None


def test_a_run_that_ends_late_leaves_the_controls_of_the_next_one_alone():
    first = Controls("7").__enter__()
    with Controls("7") as second:
        first.__exit__(None, None, None)
        assert controls.of("7") is second


def test_a_node_without_an_id_cannot_be_asked():
    with Controls(None) as asked:
        assert controls.of(None) is None
        asked.wait()


@pytest.mark.parametrize("ending", ["resume", "finish"])
def test_a_pause_lasts_until_it_is_told_to_go_on_or_to_finish(ending):
    told = []
    with Controls("7", lambda: told.append(asked.waiting)) as asked:
        controls.ask("7", "pause")
        assert asked.paused() and not asked.waiting
        waiting = threading.Thread(target=asked.wait)
        waiting.start()
        waiting.join(0.3)
        assert waiting.is_alive() and asked.waiting
        controls.ask("7", ending)
        waiting.join(5)
        assert not waiting.is_alive() and not asked.waiting and not asked.paused()
        assert asked.take("finish") == (ending == "finish")
    assert told == [False, True, True, False]


def test_cancel_ends_a_pause():
    with Controls("7") as asked:
        controls.ask("7", "pause")
        threading.Timer(0.2, mm.interrupt_current_processing).start()
        with pytest.raises(mm.InterruptProcessingException):
            asked.wait()
        assert not asked.waiting


@pytest.mark.parametrize("action", ["save", "preview"])
def test_during_a_pause_nothing_can_be_drawn_or_saved(action):
    with Controls("7") as asked:
        asked.ask("pause")
        assert asked.possible() == ["finish", "resume"]
        with pytest.raises(NotPossible, match=f"is paused: continue first, then {action}"):
            asked.ask(action)
        asked.ask("resume")
        asked.ask(action)
        assert asked.take(action)
