import json
import math
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from toys import Batches, Denoiser, equal

from lora_workbench.training import lora_file, whole_file
from lora_workbench.training.checkpoint import Checkpoint
from lora_workbench.training.config import TrainConfig
from lora_workbench.training.loop import Snapshot, Step, train
from lora_workbench.training.recording import recorded, validated
from lora_workbench.training.run import TrainingRun, safe_name
from lora_workbench.training.whole_file import checksummed, read_checksummed

IDENTITY = {"model": "abc", "train": {"learning_rate": 1e-4, "seed": 0}, "lora": {"rank": 4, "alpha": 0.0}}


@pytest.fixture
def folders(tmp_path):
    return tmp_path / "runs", tmp_path / "loras"


def open_run(folders, name="star", identity=IDENTITY, **options):
    return TrainingRun.open(*folders, name, identity, **options)


def snapshot(step=10, fill=0.5):
    return Snapshot(
        step, {"a.down": torch.full((2, 3), fill), "a.up": torch.full((2, 3), fill)}, {"0.step": torch.tensor(10.0)}
    )


def write_lora(path, snapshot, average=""):
    tensors = {name: tensor.half().contiguous() for name, tensor in snapshot.weights.items()}
    lora_file.write(path, tensors, {"average": average, **{f"ss_{letter}": letter for letter in "abcdefgh"}})


def saved_run(folders, *steps, **options):
    run = open_run(folders, **options)
    for step in steps or (10,):
        run.save(snapshot(step), write_lora, 0.25)
    return run


def step_of(number, loss=0.5, skipped=False):
    return Step(number, loss, 1e-4, skipped)


# Names


@pytest.mark.parametrize("name", ["zork star", "Zoë", "星形の猫", "my_lora-v1.5", "звезда", "a b c"])
def test_a_name_that_works_everywhere_is_kept_as_it_is(name):
    assert safe_name(name) == name


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "..\\..\\windows",
        "/etc/passwd",
        "C:\\x",
        "a/b",
        ".hidden",
        "~/x",
        "a\x00b",
        "x\n",
        'n?*<>|"',
        "x. ",
    ],
)
def test_a_name_can_never_leave_its_folder_or_break_a_file_system(name, tmp_path):
    cleaned = safe_name(name)
    assert (tmp_path / cleaned).resolve().parent == tmp_path.resolve()
    assert (
        not set(cleaned) & set('<>:"/\\|?*\x00\n') and not cleaned.startswith(".") and not cleaned.endswith((".", " "))
    )
    (tmp_path / cleaned).mkdir()


def test_long_names_that_begin_alike_are_two_names():
    first, second = (safe_name("x" * 99 + ending) for ending in ("_portrait_seed1", "_portrait_seed2"))
    assert first != second and first == safe_name("x" * 99 + "_portrait_seed1")
    assert first.startswith("x" * 90) and len(first) == 100
    assert safe_name("x" * 100) == "x" * 100


@pytest.mark.parametrize("name", ["", "   ", "..", "/", "con", "NUL", "com1", "Lpt9", "aux.tar", "CON .x", "***"])
def test_a_name_that_cannot_be_a_file_is_refused_in_one_sentence(name):
    with pytest.raises(ValueError, match="^name '.*' cannot be a file name: .*'my_lora'\\.$"):
        safe_name(name)


@pytest.mark.parametrize("letter", ["x", "é", "星", "🌟"])
def test_a_very_long_name_in_any_script_still_makes_a_file_that_can_be_written(letter, folders):
    run = saved_run(folders, name=letter * 500)
    assert run.checkpoints()[0].step == 10
    assert set(run.name[:20]) == {letter}


# One run, found again


def test_a_run_is_found_again_by_its_name_and_identity(folders):
    saved_run(folders)
    again = open_run(folders, identity=json.loads(json.dumps(IDENTITY)))
    assert (again.name, again.step) == ("star", 10)


def test_another_training_under_the_same_name_becomes_a_new_version_and_overwrites_nothing(folders):
    first = saved_run(folders)
    content = {path: path.read_bytes() for path in (*first.folder.iterdir(), *(first.loras / first.name).iterdir())}
    second = saved_run(folders, identity={**IDENTITY, "model": "other"})
    third = saved_run(folders, identity={**IDENTITY, "model": "third"})
    assert [second.name, third.name] == ["star_v2", "star_v3"]
    assert second.title == "star"
    assert {path: path.read_bytes() for path in content} == content
    assert open_run(folders).name == "star"
    assert open_run(folders, identity={**IDENTITY, "model": "other"}).name == "star_v2"


def test_starting_over_makes_a_new_version_of_the_same_training(folders):
    saved_run(folders)
    over = saved_run(folders, start_over=True)
    assert (over.name, over.step) == ("star_v2", 10)
    assert open_run(folders, start_over=True).name == "star_v3"


def test_a_loras_folder_that_someone_else_made_is_left_alone(folders):
    theirs = folders[1] / "star" / "precious.safetensors"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"precious")
    assert saved_run(folders).name == "star_v2"
    assert list(theirs.parent.iterdir()) == [theirs]


def test_a_run_that_ended_before_its_first_step_leaves_its_name_to_the_next(folders):
    open_run(folders).begin()
    other = open_run(folders, identity={**IDENTITY, "model": "other"})
    assert (other.name, other.notes) == ("star", ())
    other.begin()
    other.save(snapshot(), write_lora, 0.25)
    assert open_run(folders, identity={**IDENTITY, "model": "other"}).step == 10
    assert open_run(folders).name == "star_v2"


def test_a_run_of_which_a_step_was_logged_keeps_its_name(folders):
    run = open_run(folders)
    run.begin()
    run.log(step_of(1), 0.1)
    assert open_run(folders, identity={**IDENTITY, "model": "other"}).name == "star_v2"


def test_an_unused_name_hides_no_later_version(folders):
    identities = [{**IDENTITY, "model": name} for name in "abc"]
    for identity in identities:
        saved_run(folders, identity=identity)
    second = folders[0] / "star_v2"
    for path in [*second.glob("state*"), *(folders[1] / "star_v2").iterdir()]:
        path.unlink()
    (folders[1] / "star_v2").rmdir()
    (second / "record.json").write_text(json.dumps({"identity": identities[1], "step": 0, "checkpoints": []}))
    assert open_run(folders, identity=identities[2]).name == "star_v3"
    assert open_run(folders, identity=IDENTITY).name == "star_v2"


def test_a_new_version_says_why_it_is_called_so(folders):
    saved_run(folders)
    lora = {"rank": 8, "alpha": 0.0}
    told = saved_run(folders, identity={**IDENTITY, "lora": lora, "dataset": "x"}).notes
    assert told == (
        "'star' was trained with other values (rank, pictures or captions) and stays as it is: this training is called "
        "'star_v2'.",
    )
    assert open_run(folders, identity={**IDENTITY, "lora": lora}).notes[0].startswith("'star' was trained with other")
    (over,) = open_run(folders, start_over=True).notes
    assert over == "'star' stays as it is: this training starts over and is called 'star_v3'."
    (folders[1] / "theirs").mkdir()
    (theirs,) = open_run(folders, name="theirs").notes
    assert theirs == (
        "The folder 'theirs' for LoRA files is taken by files whose training is not among the runs here, so this "
        "training is called 'theirs_v2'."
    )


def test_a_start_over_that_ended_before_its_first_step_does_not_stand_before_the_finished_run(folders):
    saved_run(folders)
    over = open_run(folders, start_over=True)
    over.begin()
    assert over.name == "star_v2"
    assert open_run(folders).name == "star" and open_run(folders).step == 10
    assert open_run(folders, start_over=True).name == "star_v2", "its name is free again"


def test_a_run_without_its_states_says_so_and_one_that_never_had_any_does_not(folders):
    run = open_run(folders)
    run.begin()
    assert not open_run(folders).has_lost_its_state
    saved_run(folders)
    assert not open_run(folders).has_lost_its_state
    for path in run.folder.glob("state*.safetensors"):
        path.unlink()
    assert open_run(folders).has_lost_its_state and open_run(folders).step == 10


def test_lora_files_that_cannot_be_read_are_set_aside_and_the_others_stay(folders):
    run = saved_run(folders)
    run.save(snapshot(20), write_lora, None)
    first, second = (Path(entry.path) for entry in run.checkpoints())
    first.write_bytes(first.read_bytes()[:-1])
    assert [entry.step for entry in run.set_aside_damaged()] == [10]
    assert [entry.step for entry in run.checkpoints()] == [20] and second.is_file()
    assert first.with_name(f"{first.name}.damaged").is_file() and not first.exists()
    assert run.set_aside_damaged() == []


@pytest.mark.parametrize("change", ["without slowdown", "with a scheduler"])
def test_a_state_of_another_version_is_one_that_cannot_be_read(folders, change):
    run = saved_run(folders)
    for path in run.folder.glob("state*.safetensors"):
        tensors, entries = read_checksummed(path)
        if change == "without slowdown":
            del entries["slowdown"]
        else:
            tensors["scheduler/x"] = torch.zeros(1)
        path.write_bytes(b"".join(bytes(piece) for piece in checksummed(tensors, entries)))
    with pytest.raises(ValueError, match=r"^The state '.*' cannot be read \(another version of .*\): set resume to "):
        open_run(folders).resume()


def test_opening_a_run_writes_nothing(folders):
    open_run(folders)
    assert not folders[0].exists() and not folders[1].exists()


def test_a_record_that_cannot_be_read_is_one_sentence_naming_the_file(folders):
    record = saved_run(folders).folder / "record.json"
    record.write_text('{"name": "star", ')
    with pytest.raises(ValueError, match="^The record '.*record.json' cannot be read .*: delete that file or") as error:
        open_run(folders)
    assert "\n" not in str(error.value)


# What is saved


def test_everything_saved_is_there_in_the_next_process(folders):
    run = saved_run(folders, 10, 20)
    run.note(settings={"rank": 4})
    run.note_validation(0, [[1.0, 2.0]])
    run.note_validation(20, [[0.5, 1.5]])

    again = open_run(folders)
    assert again.step == 20 and again.base_validation == [[1.0, 2.0]]
    assert [entry.step for entry in again.checkpoints()] == [10, 20]
    assert again.checkpoints() == run.checkpoints()
    assert again.checkpoints()[1].validation == [[0.5, 1.5]]
    assert json.loads((again.folder / "record.json").read_text())["settings"] == {"rank": 4}


def test_a_checkpoint_lies_among_the_loras_under_the_name_loaders_list(folders):
    (entry,) = saved_run(folders, 120).checkpoints()
    path = folders[1] / "star" / "star_000120.safetensors"
    assert (entry.path, entry.lora_name) == (str(path), str(path.relative_to(folders[1])))
    assert set(load_file(path)) == {"a.down", "a.up"}


def test_the_state_comes_back_bit_for_bit_in_float32(folders):
    run = open_run(folders)
    saved = Snapshot(7, {"a.down": torch.randn(2, 3)}, {"0.step": torch.tensor(7.0), "0.exp_avg": torch.randn(2, 3)})
    run.save(saved, write_lora_nothing, None)
    back = open_run(folders).resume()
    assert back.step == 7
    assert equal(back.weights, saved.weights) and equal(back.optimizer, saved.optimizer)


def write_lora_nothing(path, snapshot):
    """A LoRA file is not what the test is about."""


def test_a_new_run_has_nothing_to_resume(folders):
    assert open_run(folders).resume() is None


def test_a_state_that_cannot_be_read_is_one_sentence_naming_the_file(folders):
    run = saved_run(folders)
    (run.folder / "state.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0torn")
    with pytest.raises(ValueError, match="^The state '.*state.safetensors' cannot be read .*start over") as error:
        open_run(folders).resume()
    assert "\n" not in str(error.value)


def test_saving_a_step_again_replaces_its_entry(folders):
    run = saved_run(folders, 10, 20, 10)
    assert [entry.step for entry in run.checkpoints()] == [10, 20]


def test_a_checkpoint_whose_file_was_deleted_is_not_offered(folders):
    run = saved_run(folders, 10, 20)
    (folders[1] / "star" / "star_000010.safetensors").unlink()
    assert [entry.step for entry in run.checkpoints()] == [20]
    assert [entry.step for entry in run.result(20, "zork").entries] == [20]


@pytest.mark.parametrize("content", ["[]", "{}", "null"])
def test_a_record_that_is_none_is_one_sentence_naming_the_file(folders, content):
    saved_run(folders, 10)
    (folders[0] / "star" / "record.json").write_text(content)
    with pytest.raises(ValueError, match="record.json' cannot be read .it is no record of a run"):
        open_run(folders)


def test_checkpoints_are_found_where_the_loras_folder_was_moved(folders, tmp_path):
    saved_run(folders, 10)
    moved = folders[1].rename(tmp_path / "elsewhere")
    (entry,) = open_run((folders[0], moved)).checkpoints()
    assert entry.path == str(moved / "star" / "star_000010.safetensors")


def test_checkpoints_are_found_where_another_system_wrote_the_run(folders):
    record = saved_run(folders, 10).folder / "record.json"
    values = json.loads(record.read_text("utf-8"))
    name = "star\\star_000010.safetensors"
    values["checkpoints"][0] |= {"path": f"C:\\ComfyUI\\models\\loras\\{name}", "lora_name": name}
    record.write_text(json.dumps(values), encoding="utf-8")
    (entry,) = open_run(folders).checkpoints()
    assert entry.path == str(folders[1] / entry.lora_name)
    assert entry.lora_name == str(Path("star", "star_000010.safetensors"))


def test_the_result_holds_the_checkpoints_up_to_the_step_that_was_asked_for(folders):
    run = saved_run(folders, 10, 20, 30)
    run.note_validation(0, [[1.0]])
    result = run.result(20, "zork")
    assert [entry.step for entry in result.entries] == [10, 20]
    assert (result.name, result.trigger_word, result.folder) == ("star", "zork", str(folders[1] / "star"))
    assert result.base_validation == [[1.0]]


def test_no_temporary_file_is_left_and_the_files_are_readable_by_others(folders, tmp_path):
    run = saved_run(folders, 10, 20)
    run.log(step_of(1), 0.1)
    names = sorted(path.name for path in tmp_path.rglob("*") if path.is_file() and path.parent.name != "tensorboard")
    assert names == [
        "metrics.csv",
        "record.json",
        "star_000010.safetensors",
        "star_000020.safetensors",
        "state.previous.safetensors",
        "state.safetensors",
    ]
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in tmp_path.rglob("*.safetensors"))


def test_when_the_disk_fails_the_old_state_and_record_stay_whole(folders, monkeypatch, tmp_path):
    """Trap 20: training never ends in peace without its file."""
    run = saved_run(folders, 10)
    before = {path: path.read_bytes() for path in run.folder.iterdir()}

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(whole_file.os, "replace", full)
    with pytest.raises(OSError, match="^The disk of '.*star' is full .No space left on device.: free some space.*[.]$"):
        run.save(snapshot(20), write_lora, 0.2)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in run.folder.iterdir()} == before
    assert not list(tmp_path.rglob(".writing-*"))
    assert open_run(folders).resume().step == 10


@pytest.mark.parametrize(("last_step", "kept"), [(12, 5), (5, 0)])
def test_when_the_disk_of_the_lora_files_is_full_the_steps_are_kept_in_the_state(folders, last_step, kept):
    """All but those of the end: a run that is trained to its end would never write its last file."""

    def full(path, snapshot):
        raise OSError("The disk is full.")

    denoiser = Denoiser()
    steps = train(denoiser, Batches(), denoiser.adapters, replace(CONFIG, steps=last_step))
    with pytest.raises(OSError, match="The disk is full"):
        list(recorded(steps, open_run(folders), full, save_every=5, last_step=last_step))
    again = open_run(folders)
    assert again.step == kept
    list(stages(again, Denoiser()))
    assert equal(again.resume().weights, unbroken(12).weights)


def test_a_full_disk_is_named_by_the_metrics_too(folders, monkeypatch):
    run = saved_run(folders)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError, match="^The disk of '.*star' is full"):
        run.log(step_of(11), 0.1)


def test_a_checkpoint_with_a_value_that_is_not_finite_is_never_written(folders):
    """Trap 8, last line of defence."""
    run = saved_run(folders, 10)
    with pytest.raises(ValueError, match="'star_000020.safetensors' was not written: .* is not finite"):
        run.save(snapshot(20, math.nan), write_lora, 0.2)
    assert [path.name for path in (folders[1] / "star").iterdir()] == ["star_000010.safetensors"]
    assert open_run(folders).step == 10 and open_run(folders).resume().step == 10


# Metrics


def test_the_losses_are_those_of_every_finite_step(folders):
    run = open_run(folders)
    for step in (step_of(1, 0.5), step_of(2, math.nan, skipped=True), step_of(3, 0.25)):
        run.log(step, 0.1)
    run.save(snapshot(3), write_lora, 0.4)
    assert open_run(folders).losses() == [(1, 0.5), (3, 0.25)]


def test_what_was_trained_past_the_last_state_and_lost_is_left_out(folders):
    run = open_run(folders)
    for number in (1, 2):
        run.log(step_of(number, 0.5), 0.1)
    run.save(snapshot(2), write_lora, 0.5)
    run.log(step_of(3, 99.0), 0.1)
    run.log(step_of(4, 99.0), 0.1)
    again = open_run(folders)
    assert again.losses() == [(1, 0.5), (2, 0.5)]
    again.log(step_of(3, 0.25), 0.1)
    again.save(snapshot(3), write_lora, 0.25)
    assert open_run(folders).losses() == [(1, 0.5), (2, 0.5), (3, 0.25)]


def test_a_line_that_a_crash_left_half_written_costs_that_line_and_not_the_run(folders):
    run = saved_run(folders, 3)
    run.log(step_of(1), 0.1)
    with open(run.folder / "metrics.csv", "a") as file:
        file.write("2,0.123")
    again = open_run(folders)
    again.log(step_of(2), 0.1)
    again.log(step_of(3), 0.1)
    assert [step for step, _ in again.losses()] == [1, 2, 3]


# Training, recorded (promise 5)

CONFIG = TrainConfig(steps=12, learning_rate=0.01)


def stages(run, denoiser, config=CONFIG, batches=None):
    steps = train(denoiser, batches or Batches(), denoiser.adapters, config, run.resume())
    return recorded(steps, run, write_lora, save_every=5, last_step=config.steps)


def unbroken(steps):
    """The snapshot after training so many steps without a pause."""
    denoiser = Denoiser()
    return [step.snapshot() for step in train(denoiser, Batches(), denoiser.adapters, CONFIG)][steps - 1]


def assert_work_is_kept(folders, denoiser, step):
    """A loadable file and a resumable state of this step, and a model that is as it was."""
    again = open_run(folders)
    assert again.step == step and again.checkpoints()[-1].step == step
    assert all(tensor.isfinite().all() for tensor in load_file(again.checkpoints()[-1].path).values())
    kept, whole = again.resume(), unbroken(step)
    assert equal(kept.weights, whole.weights) and equal(kept.optimizer, whole.optimizer)
    assert not [module for module in denoiser.network.modules() if "forward" in module.__dict__]


def test_checkpoints_come_every_so_many_steps_and_at_the_end(folders):
    run = open_run(folders)
    events = list(stages(run, Denoiser()))
    assert [event.step for event in events if isinstance(event, Checkpoint)] == [5, 10, 12]
    assert [event.number for event in events if isinstance(event, Step)] == list(range(1, 13))
    assert [step for step, _ in run.losses()] == list(range(1, 13))


def test_a_checkpoint_comes_right_after_its_step_while_its_weights_are_the_current_ones(folders):
    denoiser = Denoiser()
    for event in stages(open_run(folders), denoiser):
        if isinstance(event, Checkpoint):
            current = {name: tensor.half() for name, tensor in denoiser.adapters.state().items()}
            assert equal(load_file(event.path), current)


def test_a_checkpoint_carries_the_mean_loss_since_the_one_before(folders):
    events = list(stages(open_run(folders), Denoiser(), batches=Batches(broken=(6,))))
    losses = [event.loss for event in events if isinstance(event, Step)]
    first, second, _ = (event for event in events if isinstance(event, Checkpoint))
    assert first.loss == pytest.approx(sum(losses[:5]) / 5)
    assert second.loss == pytest.approx((losses[5] + losses[7] + losses[8] + losses[9]) / 4)


class Cancelled(BaseException):
    """ComfyUI's interrupt is an Exception in some versions and a BaseException in others."""


@pytest.mark.parametrize("error", [RuntimeError, Cancelled, KeyboardInterrupt])
def test_an_error_in_the_middle_of_a_step_keeps_the_steps_before_it(folders, error):
    class Broken(Batches):
        def __getitem__(self, number):
            if number == 7:
                raise error
            return super().__getitem__(number)

    denoiser = Denoiser()
    with pytest.raises(error):
        list(stages(open_run(folders), denoiser, batches=Broken()))
    assert_work_is_kept(folders, denoiser, 7)


@pytest.mark.parametrize("error", [RuntimeError, Cancelled, KeyboardInterrupt])
def test_an_error_of_whoever_watches_between_two_steps_keeps_the_work(folders, error):
    def cancelling(steps):
        for step in steps:
            yield step
            if step.number == 8:
                raise error

    run, denoiser = open_run(folders), Denoiser()
    with closing(train(denoiser, Batches(), denoiser.adapters, CONFIG)) as steps, pytest.raises(error):
        list(recorded(cancelling(steps), run, write_lora, save_every=5, last_step=12))
    assert_work_is_kept(folders, denoiser, 8)


def test_steps_that_stop_early_end_with_a_checkpoint(folders):
    """*Finish now*: a stage simply stops passing steps on."""

    def finishing(steps):
        for step in steps:
            yield step
            if step.number == 3:
                return

    run, denoiser = open_run(folders), Denoiser()
    steps = train(denoiser, Batches(), denoiser.adapters, CONFIG)
    events = list(recorded(finishing(steps), run, write_lora, save_every=5, last_step=12))
    assert isinstance(events[-1], Checkpoint) and events[-1].step == 3
    assert_work_is_kept(folders, denoiser, 3)


def test_whoever_stops_listening_leaves_the_work_saved(folders):
    run, denoiser = open_run(folders), Denoiser()
    with closing(stages(run, denoiser)) as events:
        for event in events:
            if isinstance(event, Step) and event.number == 4:
                break
    assert_work_is_kept(folders, denoiser, 4)


def test_stopping_right_after_a_checkpoint_writes_it_once(folders):
    written = []
    run, denoiser = open_run(folders), Denoiser()
    steps = train(denoiser, Batches(), denoiser.adapters, CONFIG)

    def writing(path, snapshot):
        written.append(snapshot.step)
        write_lora(path, snapshot)

    with closing(recorded(steps, run, writing, save_every=5, last_step=12)) as events:
        for event in events:
            if isinstance(event, Checkpoint):
                break
    assert written == [5]


def test_three_broken_steps_keep_the_work_before_them(folders):
    denoiser = Denoiser()
    with pytest.raises(FloatingPointError):
        list(stages(open_run(folders), denoiser, batches=Batches(broken=(6, 7, 8))))
    again = open_run(folders)
    assert again.step == 8  # the two steps that were skipped changed nothing
    assert equal(again.resume().weights, unbroken(6).weights)


def test_queueing_again_continues_where_it_stopped_and_ends_as_if_it_never_had(folders):
    """Promises 4 and 6 through the files."""
    with closing(stages(open_run(folders), Denoiser())) as events:
        next(event for event in events if isinstance(event, Step) and event.number == 7)
    events = list(stages(open_run(folders), Denoiser()))
    assert [event.number for event in events if isinstance(event, Step)] == list(range(8, 13))
    assert equal(open_run(folders).resume().weights, unbroken(12).weights)
    assert [step for step, _ in open_run(folders).losses()] == list(range(1, 13))


def test_queueing_a_finished_run_again_trains_and_writes_nothing(folders):
    list(stages(open_run(folders), Denoiser()))
    run = open_run(folders)
    before = {path: path.stat().st_mtime_ns for path in run.folder.iterdir()}
    assert list(stages(run, Denoiser())) == []
    assert {path: path.stat().st_mtime_ns for path in run.folder.iterdir()} == before


def test_more_steps_extend_the_run_and_keep_its_checkpoints(folders):
    list(stages(open_run(folders), Denoiser()))
    list(stages(open_run(folders), Denoiser(), config=TrainConfig(steps=15, learning_rate=0.01)))
    assert [entry.step for entry in open_run(folders).checkpoints()] == [5, 10, 12, 15]


def test_a_run_whose_state_was_deleted_starts_again_and_still_keeps_its_work(folders):
    list(stages(open_run(folders), Denoiser()))
    for path in open_run(folders).folder.glob("state*.safetensors"):
        path.unlink()
    denoiser = Denoiser()
    with closing(stages(open_run(folders), denoiser)) as events:
        next(event for event in events if isinstance(event, Step) and event.number == 3)
    run = open_run(folders)
    assert run.resume().step == 3
    assert equal(run.resume().weights, unbroken(3).weights)


def test_the_same_training_writes_the_same_bytes_twice(tmp_path):
    files = []
    for attempt in ("one", "two"):
        folders = tmp_path / attempt / "runs", tmp_path / attempt / "loras"
        list(stages(open_run(folders), Denoiser()))
        paths = (*sorted((folders[1] / "star").iterdir()), folders[0] / "star" / "state.safetensors")
        files.append([path.read_bytes() for path in paths])
    assert len(files[0]) == 4 and files[0] == files[1]


# Whole or not at all


def damage(path):
    """One byte of the tensors turned over, as a failing disk does."""
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def test_a_damaged_state_is_set_aside_for_the_one_before_and_the_end_is_the_same(folders):
    list(stages(open_run(folders), Denoiser()))
    damage(open_run(folders).folder / "state.safetensors")
    again = open_run(folders)
    events = list(stages(again, Denoiser()))
    assert [event.number for event in events if isinstance(event, Step)] == [11, 12]
    assert equal(again.resume().weights, unbroken(12).weights)
    assert again.notes == ("The newest state was damaged and set aside; training went on from step 10.",)
    assert (again.folder / "state.damaged.safetensors").is_file()


def test_when_both_states_are_damaged_one_sentence_names_the_newest(folders):
    run = saved_run(folders, 10, 20)
    for path in run.folder.glob("state*.safetensors"):
        damage(path)
    with pytest.raises(ValueError, match="^The state '.*/state.safetensors' cannot be read .its checksum differs"):
        open_run(folders).resume()


@pytest.mark.parametrize("writes", range(1, 6))
def test_whichever_write_of_a_checkpoint_fails_the_run_goes_on_and_ends_the_same(folders, monkeypatch, writes):
    """LoRA file, record, state before, state, record: each in turn is the last that was begun before the kill."""
    run, denoiser = open_run(folders), Denoiser()
    with closing(stages(run, denoiser)) as events:
        next(event for event in events if isinstance(event, Checkpoint))
        count, replace_ = [], whole_file.os.replace

        def killed(*paths):
            count.append(paths)
            if len(count) >= writes:
                raise Cancelled
            replace_(*paths)

        monkeypatch.setattr(whole_file.os, "replace", killed)
        with pytest.raises(Cancelled):
            list(events)
    monkeypatch.undo()
    again = open_run(folders)
    assert again.name == "star" and again.resume().step == again.step in (5, 10)
    list(stages(again, Denoiser()))
    assert equal(open_run(folders).resume().weights, unbroken(12).weights)
    assert [entry.step for entry in open_run(folders).checkpoints()] == [5, 10, 12]


def test_a_run_killed_before_its_first_checkpoint_was_recorded_is_found_under_its_own_name(folders):
    """The LoRA file is there, its record is not yet: without the record of the beginning it would be someone else's."""

    def killed(path, snapshot):
        write_lora(path, snapshot)
        raise Cancelled

    denoiser = Denoiser()
    steps = train(denoiser, Batches(), denoiser.adapters, CONFIG)
    with pytest.raises(Cancelled):
        list(recorded(steps, open_run(folders), killed, save_every=5, last_step=12))
    again = open_run(folders)
    assert (again.name, again.step) == ("star", 0)
    list(stages(again, Denoiser()))
    assert equal(again.resume().weights, unbroken(12).weights)


def test_going_on_removes_what_a_kill_left_half_written(folders):
    run = saved_run(folders, 10)
    left = [
        run.folder / ".writing-a.json",
        run.folder / "previews" / ".writing-b.png",
        run.loras / "star" / ".writing-c",
    ]
    for path in left:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"half")
    open_run(folders).begin()
    assert not [path for path in left if path.exists()]


# Averages, asked checkpoints, going back


def with_average(step):
    return Snapshot(step, {"a.down": torch.full((2, 3), 0.5)}, {}, {"a.down": torch.full((2, 3), 0.25)})


def test_each_checkpoint_of_a_run_with_an_average_has_a_file_for_it(folders):
    run = open_run(folders)
    first, second = run.save(with_average(10), write_lora, 0.25)
    assert (first.average, second.average) == ("", "EMA")
    assert second.lora_name.endswith("star_000010_ema.safetensors")
    assert (load_file(second.path)["a.down"] == 0.25).all() and (load_file(first.path)["a.down"] == 0.5).all()
    again = open_run(folders)
    assert equal(again.resume().ema, with_average(10).ema)
    result = again.result(10, "zork")
    assert [entry.average for entry in result.averages] == ["EMA"] and [entry.step for entry in result.entries] == [10]


def test_the_average_of_the_last_checkpoints_is_their_mean_and_made_once(folders):
    run = open_run(folders)
    for step, fill in ((10, 9.0), (20, 1.0), (30, 2.0), (40, 6.0)):
        run.save(snapshot(step, fill), write_lora, 0.25)
    entry = run.average_of_last(3, up_to=10_000)
    assert (entry.step, entry.average) == (40, "last 3") and entry.path.endswith("star_last3.safetensors")
    file = load_file(entry.path)
    assert (file["a.down"] == 3.0).all() and file["a.down"].dtype == torch.float16
    before = path_facts(entry.path)
    again = open_run(folders)
    assert again.average_of_last(3, up_to=10_000) == entry and path_facts(entry.path) == before
    run.save(snapshot(50, 7.0), write_lora, 0.25)
    assert (load_file(run.average_of_last(3, up_to=10_000).path)["a.down"] == 5.0).all()
    assert [average.step for average in open_run(folders).averages()] == [50]


def path_facts(path):
    with open(path, "rb") as file:
        return file.read(), Path(path).stat().st_mtime_ns


@pytest.mark.parametrize("count", [0, 1, 3])
def test_of_one_checkpoint_or_none_there_is_no_average(folders, count):
    run = saved_run(folders, 10)
    assert run.average_of_last(count, up_to=10_000) is None and run.averages() == ()


def test_a_checkpoint_comes_when_it_is_asked_for(folders):
    wishes = iter([False, False, True] + [False] * 20)
    run, denoiser = open_run(folders), Denoiser()
    steps = train(denoiser, Batches(), denoiser.adapters, CONFIG)
    events = recorded(steps, run, write_lora, save_every=100, last_step=12, asked=lambda: next(wishes))
    assert [event.step for event in events if isinstance(event, Checkpoint)] == [3, 12]


def test_the_rate_after_a_roll_back_is_part_of_the_state(folders):
    run = open_run(folders)
    assert run.slowdown == 1.0
    run.back_to(5, 0.25)
    run.save(snapshot(6), write_lora, None)
    again = open_run(folders)
    again.resume()
    assert again.slowdown == 0.25


def test_what_was_saved_past_the_step_that_training_went_back_to_is_no_longer_offered(folders):
    run = saved_run(folders, 5, 10)
    run.note_validation(10, [[1.0]])
    run.back_to(5, 0.5)
    assert [entry.step for entry in run.checkpoints()] == [5] and run.validations() == []


def test_a_file_in_use_does_not_keep_training_from_going_back(folders, monkeypatch):
    def held(path, missing_ok=False):
        raise PermissionError(13, "Access is denied", str(path))

    run = saved_run(folders, 5, 10)
    monkeypatch.setattr("lora_workbench.training.whole_file.PATIENCE", 0.0)
    monkeypatch.setattr(Path, "unlink", held)
    run.back_to(5, 0.5)
    assert [entry.step for entry in run.checkpoints()] == [5]


def test_the_first_step_after_going_back_brings_the_state_on_disk_back_too(folders):
    """A kill right after a roll-back must not find the state that went wrong."""
    run = saved_run(folders, 10)

    def going_back():
        run.back_to(4, 0.5)
        yield Step(5, 0.5, 1e-4, False, _taken=snapshot)
        raise SystemExit

    events = recorded(going_back(), run, write_lora, save_every=100, last_step=200)
    next(events)
    with suppress(SystemExit):
        next(events)
    again = open_run(folders)
    assert again.resume().step == 5 and again.slowdown == 0.5


# Validation as a stage


def asked_pictures(folders, every, stop=None, cancel=Cancelled):
    """The run after training, what was measured at each question, and at which step of the adapters."""
    run, denoiser = open_run(folders), Denoiser()
    told = []

    def measure():
        told.append({name: tensor.clone() for name, tensor in denoiser.adapters.state().items()})
        return [[float(len(told)), 1.0]]

    def stopping(steps):
        for step in steps:
            yield step
            if step.number == stop:
                raise cancel

    config = replace(CONFIG, ema=0.9)
    steps = stopping(train(denoiser, Batches(), denoiser.adapters, config, run.resume()))
    events = recorded(steps, run, write_lora, save_every=5, last_step=12)
    with suppress(cancel):
        list(validated(events, run, measure, denoiser.adapters, interrupt=cancel, every=every))
    return run, told


def test_held_out_pictures_are_asked_at_checkpoints_and_between_them_and_once_a_step(folders):
    run, _ = asked_pictures(folders, every=4)
    assert [step for step, _ in run.validations()] == [4, 5, 8, 10, 12]
    again = open_run(folders)
    assert again.validations() == run.validations()
    assert [entry.validation[0][1] for entry in again.checkpoints()] == [1.0] * 3
    assert [point.step for point in again.points() if point.validation is not None] == [4, 5, 8, 10, 12]


def test_an_average_is_measured_with_its_own_weights_and_training_goes_on_with_its_own(folders):
    run, told = asked_pictures(folders, every=0)
    assert len(told) == 6 and not equal(told[0], told[1])
    averages = {entry.step: load_file(entry.path) for entry in run.averages()}
    assert equal({name: tensor.half() for name, tensor in told[1].items()}, averages[5])
    assert all(entry.validation for entry in run.averages())
    assert equal(run.resume().weights, unbroken(12).weights)


class CancelledOfOld(Exception):
    """What it was in the oldest versions of ComfyUI that are supported."""


@pytest.mark.parametrize("cancel", [Cancelled, CancelledOfOld])
def test_after_a_cancel_the_checkpoint_it_left_is_measured_where_that_takes_a_moment(folders, cancel):
    run, _ = asked_pictures(folders, every=0, stop=8, cancel=cancel)
    assert [step for step, _ in run.validations()] == [5, 8]
