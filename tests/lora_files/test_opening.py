"""Any file may be handed to us: a good one is read as it is, any other is a sentence, and nothing is touched."""

import os
import time

import hostilefiles
import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_workbench.lora_files import opening
from lora_workbench.lora_files.opening import finite, open_lora

LONGEST_WAIT = 10.0  # seconds for one file; measured: below 0.3


def good(path):
    tensors = {
        "a.lora_up.weight": torch.randn(3, 4),
        "a.lora_down.weight": torch.randn(4, 5).bfloat16(),
        "a.alpha": torch.tensor(2.0, dtype=torch.float16),
        "b.hada_w1_a": torch.randn(7).to(torch.float8_e4m3fn),
        "b.hada_w1_b": torch.randn(3).to(torch.float8_e5m2),
        "b.double": torch.randn(2, dtype=torch.float64),
        "c.empty": torch.empty(0, 3),
        "c.numbers": torch.tensor([1, -2, 3]),
        "c.bytes": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "c.flags": torch.tensor([True, False, True]),
    }
    save_file(tensors, path, {"ss_output_name": "müde", "other": "x" * 1000})
    return tensors


def test_a_good_file_is_read_as_safetensors_reads_it(tmp_path):
    path = tmp_path / "good.safetensors"
    good(path)
    file = open_lora(path)
    expected = load_file(path)
    assert file.path == path and file.entries == {"ss_output_name": "müde", "other": "x" * 1000}
    assert file.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        read = file.tensors[name]
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read.flatten().view(torch.uint8), tensor.flatten().view(torch.uint8))
    finite(file)


def test_a_file_may_be_moved_or_written_anew_while_its_tensors_are_held(tmp_path):
    path = tmp_path / "good.safetensors"
    expected = good(path)["a.lora_up.weight"]
    file = open_lora(path)
    path.write_bytes(b"")
    assert torch.equal(file.tensors["a.lora_up.weight"], expected)


def test_a_thousand_hostile_files_are_a_sentence_each_and_none_is_touched(tmp_path):
    """Truncated, huge headers, wrong types and shapes, path-like names, doubles, overlaps, deep JSON, NaN and more."""
    folder = tmp_path / "loras"
    folder.mkdir()
    (tmp_path / "outside").write_text("as it was")
    files = hostilefiles.files()
    assert len(files) == hostilefiles.COUNT and len({data for _, data in files}) > 800
    for number, (_, data) in enumerate(files):
        (folder / f"{number}.safetensors").write_bytes(data)
    before, said = hostilefiles.digest_of(tmp_path), []
    for number, (kind, _) in enumerate(files):
        start = time.perf_counter()
        with pytest.raises(ValueError, match=rf"^The LoRA file '{number}\.safetensors' ") as caught:
            finite(open_lora(folder / f"{number}.safetensors"))
        assert time.perf_counter() - start < LONGEST_WAIT, kind
        said.append(str(caught.value))
    assert all(text.isprintable() and len(text) < 500 and text.endswith(".") for text in said)
    assert len(set(hostilefiles.reasons(said))) > 20
    assert hostilefiles.digest_of(tmp_path) == before


def test_values_that_are_not_finite_are_let_in_and_named_when_asked(tmp_path):
    path = tmp_path / "nan.safetensors"
    save_file({"fine": torch.ones(2), "broken": torch.tensor([1.0, float("nan")]).to(torch.float8_e5m2)}, path)
    with pytest.raises(ValueError, match="'nan.safetensors' is broken: 'broken' holds values that are not finite"):
        finite(open_lora(path))


def test_what_is_no_file_is_said(tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "empty.safetensors").write_bytes(b"")
    (tmp_path / "loop.safetensors").symlink_to(tmp_path / "loop.safetensors")
    (tmp_path / "device.safetensors").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "pickle.pt").write_bytes(b"\x80\x02}q\x00.")
    names = [path.name for path in tmp_path.iterdir()]
    for name in (*names, "gone.safetensors", "nul\0.safetensors"):
        with pytest.raises(ValueError, match="cannot be read: "):
            open_lora(tmp_path / name)
    with pytest.raises(ValueError, match="only .safetensors files are read, since others can run programs"):
        open_lora(tmp_path / "pickle.pt")


def test_a_file_larger_than_any_lora_is_not_read(tmp_path):
    path = tmp_path / "huge.safetensors"
    good(path)
    os.truncate(path, opening.LARGEST_FILE + 1)  # takes no room on the disk
    with pytest.raises(ValueError, match="16 GiB are more than a LoRA can have"):
        open_lora(path)


def test_a_file_that_shrinks_while_it_is_read_is_said(tmp_path, monkeypatch):
    path = tmp_path / "shrinking.safetensors"
    save_file({"large": torch.ones(50_000)}, path)
    check = opening._check_order
    monkeypatch.setattr(opening, "_check_order", lambda *given: (check(*given), os.truncate(path, 100_000)))
    with pytest.raises(ValueError, match="it became shorter while it was read"):
        open_lora(path)
