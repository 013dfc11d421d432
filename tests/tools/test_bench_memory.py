"""The memory benchmark measures every plan over one model, and what each keeps on the device."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.comfy
def test_every_plan_has_a_line_with_less_memory_than_the_plain_one(comfyui):
    chosen = ["--here", "--comfyui", str(comfyui), "--size", "toy", "--family", "flux", "--batch", "2", "--rounds", "1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench.py"), "memory", *chosen],
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    plain, *saving = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert (plain["parts"], plain["recompute"], plain["resident"], plain["over_plain"]) == (1, "no", 1.0, 1.0)
    assert {(line["parts"], line["recompute"], line["resident"]) for line in saving} == {
        (1, "every second block", 1.0),
        (1, "every block", 1.0),
        *((1, "every block", share) for share in (0.75, 0.5, 0.25, 0.0)),
        (2, "no", 1.0),
    }
    for line in saving:
        assert line["over_plain"] > 0 and line["peak_mb"] < plain["peak_mb"]
        assert line["weights_mb"] <= line["resident"] * plain["weights_mb"] + 0.1
