"""The quality trials train on what their words say."""

import bench_quality
from PIL import Image

from toyworld import judge


def test_the_taken_word_is_said_of_the_known_thing_alone(tmp_path):
    trial = bench_quality.TRIALS["taken_pivotal"]
    trial.pictures(tmp_path / "pictures", 3)
    captions = {path: path.with_suffix(".txt").read_text() for path in (tmp_path / "pictures").glob("*.png")}
    called = {path for path, caption in captions.items() if trial.word in caption.split()}
    shown = {path for path in captions if judge.shows(Image.open(path), *trial.concept)}
    assert called == shown and len(called) == 8 and len(captions) == 12


def test_a_new_word_is_compared_at_equal_steps_and_pictures():
    for alone, pivotal in (("half", "pivotal"), ("taken_half", "taken_pivotal")):
        alone, pivotal = bench_quality.TRIALS[alone], bench_quality.TRIALS[pivotal]
        assert (alone.steps, alone.rate, alone.pictures, alone.word) == (
            pivotal.steps, pivotal.rate, pivotal.pictures, pivotal.word,
        )  # fmt: skip
        assert not alone.settings and pivotal.settings["new_tokens"] == 1
