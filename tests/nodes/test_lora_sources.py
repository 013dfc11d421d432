"""How the files a node reads are opened, and how sizes, shares and ranks are said."""

from pathlib import Path

import folder_paths
import pytest
import torch
from safetensors.torch import save_file

from lora_workbench.lora_files.opening import LoraFile
from lora_workbench.nodes import lora_sources
from lora_workbench.nodes.convert_lora import LoraWorkbenchConvertLora
from lora_workbench.nodes.inspect_lora import LoraWorkbenchInspectLora
from lora_workbench.nodes.resize_lora import LoraWorkbenchResizeLora
from lora_workbench.nodes.trainer import LoraWorkbenchTrainer

pytestmark = pytest.mark.comfy


def file(*dtypes):
    tensors = {f"{number}.lora_up.weight": torch.ones(2, 2).to(dtype) for number, dtype in enumerate(dtypes)}
    exact = {"0.alpha": torch.tensor(1.0), "0.dora_scale": torch.ones(1, 2), "1.lora_magnitude_vector": torch.ones(2)}
    return LoraFile(Path("a.safetensors"), tensors | exact, {})


def test_files_of_one_precision_keep_it_and_mixed_ones_are_written_in_full():
    half, brain, full, eight = torch.float16, torch.bfloat16, torch.float32, torch.float8_e4m3fn
    for files, precision in (
        ([file(half), file(half, half)], half),
        ([file(brain)], brain),
        ([file(half), file(brain)], full),
        ([file(full), file(half)], full),
        ([file(eight)], half),
        ([file(eight), file(half)], half),
    ):
        assert lora_sources.precision_of(files) == precision


@pytest.mark.parametrize(
    "size, said",
    [(999, "999 bytes"), (1234, "1.2 kB"), (40_000_000, "40 MB"), (220_400_000, "220 MB"), (6 * 10**9, "6.0 GB")],
)
def test_sizes_are_said_in_round_numbers(size, said, tmp_path):
    path = tmp_path / "a"
    with path.open("wb") as made:
        made.truncate(size)
    assert lora_sources.size_of(path) == said


def test_only_what_is_whole_is_100_percent():
    said = [lora_sources.percent(share) for share in (1.0, 0.99999, 0.9991, 0.987, 0.5, 0.0)]
    assert said == ["100 %", "99.99 %", "99.91 %", "98.7 %", "50.0 %", "0.0 %"]


def test_ranks_are_said_as_one_or_as_a_span():
    assert lora_sources.ranks_in_words([4, 4]) == "rank 4" and lora_sources.ranks_in_words([8, 2, 4]) == "ranks 2 to 8"


def test_another_file_of_the_same_name_is_another_state(tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    save_file({"x.lora_up.weight": torch.ones(2, 2)}, tmp_path / "a.safetensors")
    before = lora_sources.state_of(["a.safetensors", "gone.safetensors", "none"])
    assert lora_sources.state_of(["a.safetensors", "gone.safetensors", "none"]) == before
    save_file({"x.lora_up.weight": torch.ones(4, 4)}, tmp_path / "a.safetensors")
    assert lora_sources.state_of(["a.safetensors", "gone.safetensors", "none"]) != before


@pytest.mark.parametrize(
    ("node", "widget", "nothing"),
    [
        (LoraWorkbenchConvertLora, "lora", "none"),
        (LoraWorkbenchInspectLora, "lora", "none"),
        (LoraWorkbenchResizeLora, "lora", "none"),
        (LoraWorkbenchTrainer, "start_from", "nothing"),
    ],
)
def test_a_graph_made_on_another_system_finds_its_lora_and_one_that_is_gone_is_a_sentence(
    node, widget, nothing, tmp_path, monkeypatch
):
    """ComfyUI lists `people\\a.safetensors` on Windows and `people/a.safetensors` elsewhere."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    (tmp_path / "people").mkdir()
    save_file({"x.lora_up.weight": torch.ones(2, 2)}, tmp_path / "people" / "a.safetensors")
    for lora in ("people/a.safetensors", "people\\a.safetensors", nothing, None):
        assert node.validate_inputs(**{widget: lora}) is True
    assert "'gone.safetensors' is not in the loras folder" in node.validate_inputs(**{widget: "gone.safetensors"})
