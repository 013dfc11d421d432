"""The peak of a network that is too large to be measured follows from those of shorter ones."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.comfy
@pytest.mark.parametrize("recompute", ["every block", "no"])
def test_a_whole_network_takes_what_its_first_blocks_foretell(comfyui, monkeypatch, recompute):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import bench_cases
    import bench_peaks

    from toyworld.node_pack import models

    monkeypatch.setattr(models, "FULL_FLUX", {**models.TINY_FLUX, "depth": 3, "depth_single_blocks": 3})
    monkeypatch.setattr(bench_cases, "FULL_PIXELS", 128)
    case = bench_cases.Case("full", "flux", 1, False, "attention + feed-forward", "cpu")
    foretold, whole = bench_peaks.of_blocks(case, recompute), bench_peaks.measured(case, recompute)
    assert foretold.peak == pytest.approx(whole.peak, rel=0.01)
    assert (foretold.adapters, foretold.weights) == (whole.adapters, whole.weights)
    assert bench_peaks.peak_line(case, recompute)["peak_mb"] == round(foretold.peak / 2**20, 1)


def teardown_module():
    for name in ("bench_cases", "bench_peaks"):
        sys.modules.pop(name, None)
