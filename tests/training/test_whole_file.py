"""Files that are whole or not there."""

import os
import random
import signal
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_workbench.training import whole_file
from lora_workbench.training.loop import Snapshot
from lora_workbench.training.run import TrainingRun
from lora_workbench.training.whole_file import (
    checksummed,
    read_checksummed,
    remove_leftovers,
    with_entries,
    write_atomically,
    write_keeping,
)

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}
KILLS = 100


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "state.bin"
    write_atomically(path, b"old")
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_somebody_reads_at_this_moment_is_waited_for(tmp_path, monkeypatch):
    path, replace, tries = tmp_path / "record.json", os.replace, []

    def shared(*paths):
        tries.append(paths)
        if len(tries) < 3:
            raise PermissionError(13, "Access is denied")
        replace(*paths)

    monkeypatch.setattr(whole_file, "PAUSE", 0.0)
    monkeypatch.setattr("os.replace", shared)
    write_atomically(path, b"new")
    assert (path.read_bytes(), len(tries)) == (b"new", 3)


def test_a_file_that_a_program_holds_is_named_and_stays_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "star_last3.safetensors"
    write_atomically(path, b"old")
    monkeypatch.setattr(whole_file, "PATIENCE", 0.0)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "Access is denied")))
    with pytest.raises(PermissionError, match="star_last3.safetensors' cannot be replaced .*: close the program"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_it_gets_its_name_and_its_name_after_that(tmp_path, monkeypatch):
    """What a power cut needs: without the first the renamed file can be empty, without the second the old one back."""
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append(os.path.isdir(f"/dev/fd/{handle}")), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("rename"), replace(*paths)))
    write_atomically(tmp_path / "state.bin", b"new")
    assert done == [False, "rename", True] if hasattr(os, "O_DIRECTORY") else done == [False, "rename"]


@pytest.mark.parametrize("links", [True, False], ids=["with hard links", "without"])
def test_the_file_before_is_kept_and_at_no_moment_are_both_gone(tmp_path, monkeypatch, links):
    path, previous = tmp_path / "state.bin", tmp_path / "state.previous.bin"
    replace = os.replace

    def watching(*paths):
        assert path.read_bytes() == b"two"
        replace(*paths)

    write_keeping(path, b"one", previous)
    assert not previous.exists()
    write_keeping(path, b"two", previous)
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    monkeypatch.setattr(os, "replace", watching)
    write_keeping(path, b"three", previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"three", b"two")
    assert sorted(tmp_path.iterdir()) == [path, previous]


def test_leftovers_of_a_killed_process_are_removed_and_nothing_else(tmp_path):
    (tmp_path / ".writing-abc.png").write_bytes(b"half")
    (tmp_path / "kept.png").write_bytes(b"whole")
    remove_leftovers([tmp_path, tmp_path / "missing"])
    assert [path.name for path in tmp_path.iterdir()] == ["kept.png"]


def test_where_others_may_be_writing_only_old_leftovers_are_removed(tmp_path):
    fresh, old = tmp_path / ".writing-fresh", tmp_path / ".writing-old"
    for path in (fresh, old):
        path.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    remove_leftovers([tmp_path], older_than=3600)
    assert list(tmp_path.iterdir()) == [fresh]


def test_a_checksummed_file_comes_back_as_it_was_and_a_changed_one_is_noticed(tmp_path):
    path = tmp_path / "state.safetensors"
    write_atomically(path, checksummed(TENSORS, {"step": "3"}))
    data = path.read_bytes()
    tensors, entries = read_checksummed(path)
    assert entries["step"] == "3" and all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    for damaged in (data[:-1] + bytes([data[-1] ^ 1]), data[:-4], data[: len(data) // 2], b"", b"\0" * len(data)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError):
            read_checksummed(path)


def test_a_checksummed_file_of_any_numbers_is_what_other_programs_read_and_copies_no_tensor(tmp_path):
    path, random = tmp_path / "state.safetensors", torch.Generator().manual_seed(0)
    tensors = {str(dtype): torch.randint(0, 2, (3, 5), generator=random).to(dtype) for dtype in whole_file.DTYPES} | {
        "turned": torch.rand(4, 6, generator=random).t(),
        "number": torch.tensor(2.5),
        "nothing": torch.zeros(0, 3),
    }
    pieces = checksummed(tensors, {"step": "3"})
    kept = {tensor.data_ptr() for tensor in tensors.values() if tensor.is_contiguous() and tensor.numel()}
    assert kept <= {piece.ctypes.data for piece in pieces[1:]}
    write_atomically(path, pieces)
    for read in (load_file(path), read_checksummed(path)[0]):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name


def test_other_metadata_leaves_the_tensors_as_they_are(tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(with_entries(b"".join(checksummed(TENSORS, {"step": "3"})), {"ss_output_name": "星"}))
    assert all(torch.equal(load_file(path)[name], TENSORS[name]) for name in TENSORS)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"ss_output_name": "星"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot copy a process")
def test_a_process_killed_again_and_again_while_it_saves_never_leaves_half_a_file(tmp_path, monkeypatch):
    """Promise 5 against SIGKILL: each child saves checkpoints as fast as it can until it is killed."""
    # A kill loses nothing that the system has taken; without waiting for the disk there are more moments to hit.
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    chance = random.Random(0)
    reached = 0
    for _ in range(KILLS):
        heard, telling = os.pipe()
        child = os.fork()
        if not child:
            save_until_killed(tmp_path, telling)
        os.close(telling)
        assert all(os.read(heard, 1) for _ in range(chance.randrange(3))), "the child ended by itself"
        time.sleep(chance.uniform(0, 0.01))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(heard)
        reached = max(reached, assert_nothing_is_lost(tmp_path, reached))
    assert reached >= KILLS / 2
    opened(tmp_path).begin()
    assert not list(tmp_path.rglob(f"{whole_file.WRITING}*"))


def save_until_killed(folder, telling):
    """What a child does, with a word after each checkpoint; it never comes back to the test."""
    try:
        run = opened(folder)
        run.begin()
        step = run.step
        while True:
            step += 1
            values = torch.full((64, 64), float(step))
            run.save(Snapshot(step, {"a": values}, {"0.step": values + 1}), write_lora, loss=float(step))
            os.write(telling, b".")
    finally:
        os._exit(1)


def write_lora(path, snapshot, average=""):
    write_atomically(path, checksummed(snapshot.weights, {"step": str(snapshot.step)}))


def opened(folder) -> TrainingRun:
    return TrainingRun.open(folder / "runs", folder / "loras", "star", {"model": "toy"})


def assert_nothing_is_lost(folder, reached: int) -> int:
    """Every file is whole, the state belongs to its step, and the run is at least where it was seen before."""
    run = opened(folder)
    assert run.name == "star"
    for path in (folder / "loras").rglob("*.safetensors"):
        if not path.name.startswith(whole_file.WRITING):
            tensors, entries = read_checksummed(path)
            assert (tensors["a"] == int(entries["step"])).all()
    snapshot = run.resume()
    step = snapshot.step if snapshot else 0
    assert step == run.step >= reached
    if snapshot:
        assert (snapshot.weights["a"] == step).all() and (snapshot.optimizer["0.step"] == step + 1).all()
        assert step in [entry.step for entry in run.checkpoints()]
    return step
