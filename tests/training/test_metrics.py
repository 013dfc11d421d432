"""metrics.csv and TensorBoard's scalars."""

import csv
import sys

import pytest

from lora_workbench.training.metrics import COLUMNS, Metrics, Point

POINTS = [
    Point(1, 0.5, 3.25, 1e-4, 0.75, 0.2),
    Point(2, None, 1.0, 1e-4, None, 0.3, skipped=True),
    Point(3, 0.1 + 0.2, 2.0, 5e-5, 1.5, 0.1),
]


@pytest.fixture
def metrics(tmp_path, monkeypatch):
    """Metrics without TensorBoard, which takes seconds to import."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    return Metrics(tmp_path / "run")


def test_what_was_kept_comes_back_to_the_last_digit(metrics, tmp_path):
    for point in POINTS:
        metrics.append(point)
    assert Metrics(tmp_path / "run").read(up_to=3) == POINTS


def test_a_spreadsheet_can_read_it(metrics, tmp_path):
    for point in POINTS:
        metrics.append(point)
    with open(tmp_path / "run" / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [row["step"] for row in rows] == ["1", "2", "3"]
    assert (rows[0]["loss"], rows[1]["loss"], rows[1]["skipped"], rows[0]["skipped"]) == ("0.5", "", "1", "0")


def test_a_validation_joins_its_step_and_a_step_that_is_taken_again_replaces_it(metrics):
    metrics.append(POINTS[0])
    metrics.append(Point(1, validation=0.25))
    assert metrics.read(9) == [Point(1, 0.5, 3.25, 1e-4, 0.75, 0.2, validation=0.25)]
    metrics.append(Point(1, 0.4, 3.25, 1e-4, 0.7, 0.2))
    assert metrics.read(9) == [Point(1, 0.4, 3.25, 1e-4, 0.7, 0.2)]


def test_what_was_trained_past_the_state_and_lost_is_left_out(metrics):
    for point in POINTS:
        metrics.append(point)
    assert [point.step for point in metrics.read(up_to=2)] == [1, 2]


@pytest.mark.parametrize("torn", [b"4,0.1", b"4", b"4,0.12,1.0,,,,0,\0\0\0", b"\xff\xfe\x00", b"4,x,,,,,0,"])
def test_half_a_line_costs_nothing_but_itself(metrics, tmp_path, torn):
    for point in POINTS:
        metrics.append(point)
    with open(tmp_path / "run" / "metrics.csv", "ab") as file:
        file.write(torn)
    assert [point for point in metrics.read(9) if point.step <= 3] == POINTS
    again = Metrics(tmp_path / "run")
    again.append(Point(4, 0.75))
    assert again.read(9) == [*POINTS, Point(4, 0.75)]


def test_a_spreadsheet_that_holds_the_file_costs_neither_a_step_nor_a_line(metrics, tmp_path, monkeypatch):
    """Excel keeps others from writing to a file that it shows."""

    def held(path, mode="r", **_):
        raise PermissionError(13, "Permission denied", str(path))

    metrics.append(POINTS[0])
    with monkeypatch.context() as shown:
        shown.setattr("builtins.open", held)
        metrics.append(POINTS[1])
        metrics.append(POINTS[2])
    assert metrics.read(9) == POINTS and Metrics(tmp_path / "run").read(9) == POINTS[:1]
    metrics.append(Point(4, 0.75))
    assert Metrics(tmp_path / "run").read(9) == [*POINTS, Point(4, 0.75)]


def test_a_run_without_metrics_has_no_points(tmp_path):
    assert Metrics(tmp_path).read(9) == []


def test_without_tensorboard_nothing_is_said_and_nothing_is_missing(metrics, tmp_path):
    metrics.append(POINTS[0])
    metrics.close()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["metrics.csv"]


def test_tensorboard_gets_scalars_and_nothing_else_and_a_resumed_run_hides_what_was_lost(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for points in ([Point(1, 0.5, 2.0), Point(2, 99.0), Point(3, 99.0)], [Point(2, 0.25), Point(3, validation=0.2)]):
        metrics = Metrics(tmp_path)
        for point in points:
            metrics.append(point)
        metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert sorted(tags.pop("scalars")) == ["loss", "sigma", "validation"]
    assert not any(tags.values())
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]
