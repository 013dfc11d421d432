"""The quality trials train on what their words say."""

import numpy
from bench_trials import TRIALS
from PIL import Image

from toyworld import judge


def test_the_taken_word_is_said_of_the_known_thing_alone(tmp_path):
    trial = TRIALS["taken_pivotal"]
    trial.pictures(tmp_path / "pictures", 3)
    captions = {path: path.with_suffix(".txt").read_text() for path in (tmp_path / "pictures").glob("*.png")}
    called = {path for path, caption in captions.items() if trial.word in caption.split()}
    shown = {path for path in captions if judge.shows(Image.open(path), *trial.concept)}
    assert called == shown and len(called) == 8 and len(captions) == 12


def test_a_new_word_is_compared_at_equal_steps_and_pictures():
    for alone, pivotal in (("half", "pivotal"), ("taken_half", "taken_pivotal")):
        alone, pivotal = TRIALS[alone], TRIALS[pivotal]
        assert (alone.steps, alone.rate, alone.pictures, alone.word) == (
            pivotal.steps, pivotal.rate, pivotal.pictures, pivotal.word,
        )  # fmt: skip
        assert not alone.settings and pivotal.settings["new_tokens"] == 1


def test_masked_trials_differ_in_what_is_done_about_the_noise_alone(tmp_path):
    ways = [TRIALS[name] for name in ("masked", "masked_kept", "masked_filled", "masked_filled_kept")]
    assert len({(way.steps, way.rate, way.pictures) for way in ways}) == 1
    for number, name in enumerate(("lora", "noise", "masked")):
        TRIALS[name].pictures(tmp_path / str(number), 3)
    for path in (tmp_path / "0").glob("*.png"):
        clean, noisy, masked = (
            numpy.asarray(Image.open(tmp_path / str(n) / path.name).convert("RGB")) for n in range(3)
        )
        learned = numpy.asarray(Image.open(tmp_path / "2" / f"{path.stem}_mask.png")) == 255
        assert numpy.array_equal(noisy, masked) and numpy.array_equal(clean[learned], noisy[learned])
        assert 0.5 < learned.mean() < 0.6 and (clean != noisy).any(2)[~learned].mean() > 0.99
