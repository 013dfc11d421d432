"""The benchmark runs, and its lines hold what they promise; how fast anything is, is not asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {
    *("case", "family", "batch", "checkpointing", "preset", "device", "seconds_ours", "seconds_trainlora"),
    *("seconds_floor", "ours_over_floor", "ours_over_trainlora", "peak_mb_ours", "peak_mb_floor"),
    *("peak_mb_trainlora", "model_mb"),
}


@pytest.mark.comfy
def test_the_benchmark_prints_a_line_for_every_case(comfyui):
    chosen = ["--here", "--comfyui", str(comfyui), "--size", "toy", "--batch", "2", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench.py"), *chosen], capture_output=True, text=True, timeout=540
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(line["family"], line["checkpointing"]) for line in lines] == [
        (family, checkpointing) for family in ("sdxl", "flux") for checkpointing in (False, True)
    ]
    for line in lines:
        assert line.keys() >= FIELDS and line["batch"] == 2
        assert all(line[f"seconds_{who}"] > 0 and line[f"peak_mb_{who}"] > 0 for who in ("ours", "floor", "trainlora"))
        # What is above the model while ours trains is less than what ComfyUI's own trainer takes, which loads it twice.
        assert line["peak_mb_ours"] < line["peak_mb_trainlora"]


@pytest.mark.comfy
def test_the_benchmark_of_stacks_prints_a_line_for_every_model(comfyui):
    chosen = ["stack", "--here", "--comfyui", str(comfyui), "--size", "toy", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench.py"), *chosen], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [(line["case"], line["loras"]) for line in lines] == [("toy-sdxl", 4), ("toy-flux", 4)]
    for line in lines:
        sides = ("ours", "ours_without_xray", "ours_xray_full")
        assert all(line[f"seconds_{who}{what}"] > 0 for who in ("chained", *sides) for what in ("", "_again"))
        assert all(line[f"{who}_over_chained{what}"] > 0 for who in sides for what in ("", "_again"))
