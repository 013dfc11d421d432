"""The dataset doctor: it finds what is wrong, and is silent about what is not."""

from dataclasses import replace

import planted
import pytest
from PIL import Image

from lora_workbench.training.doctor import as_split, examine
from lora_workbench.training.folder import scan


@pytest.fixture(scope="module")
def good():
    pytest.importorskip("skimage")
    return planted.good()


def test_every_plant_is_found_and_good_pictures_are_left_alone(good, tmp_path):
    paths = planted.write_good(tmp_path, good)
    expected = planted.write_plants(tmp_path, good)
    diagnosis = examine(scan(tmp_path, trigger_word=planted.TRIGGER, resolution=planted.SIDE), style="sentences")
    missed = {path.name: kind for path, kind in expected.items() if kind not in {f.kind for f in diagnosis.of(path)}}
    flagged = [f for path in paths for f in diagnosis.of(path)]
    assert missed == {}
    assert len({f.path for f in flagged}) <= 2, flagged
    assert len(set(expected.values())) >= 10


def test_a_clean_set_is_silent(good, tmp_path):
    planted.write_good(tmp_path, good)
    diagnosis = examine(scan(tmp_path, trigger_word=planted.TRIGGER, resolution=planted.SIDE), style="sentences")
    assert diagnosis.findings == () and diagnosis.clusters == ()


def examined(folder, resolution=64, **settings):
    return examine(scan(folder, resolution=resolution, trigger_word="zork"), **settings)


def kinds(diagnosis, path=None):
    return [finding.kind for finding in diagnosis.of(path)]


def test_captions_alike_and_long_are_told_of_the_whole_set(tmp_path):
    for number in range(10):
        planted.drawn(number).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a red carpet" if number < 9 else "some other words of which are many")
    diagnosis = examined(tmp_path, tokens=lambda text: len(text.split()), limit=5)
    assert kinds(diagnosis) == ["identical captions", "tied phrase", "long captions"]
    assert "“red carpet” is in 90% of the captions" in diagnosis.findings[1].message
    assert "9.png with 8" in diagnosis.findings[2].message
    assert diagnosis.limit == 5 and diagnosis.tokens[tmp_path / "0.png"] == 4


def test_a_picture_alone_in_its_shape_is_told(tmp_path):
    for number in range(3):
        planted.drawn(number).crop((0, 0, 256, 256 if number else 128)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"zork number {number}")
    assert kinds(examined(tmp_path, resolution=128)) == ["one-picture bucket"]
    assert "192 x 64 (0.png)" in examined(tmp_path, resolution=128).findings[0].message


def test_two_pictures_with_one_caption_file_are_told(tmp_path):
    planted.drawn(1).save(tmp_path / "a.png")
    planted.drawn(2).save(tmp_path / "a.jpg")
    (tmp_path / "a.txt").write_text("zork on a chair")
    assert "one caption file" in kinds(examined(tmp_path))


def test_a_held_out_picture_with_a_twin_in_training_is_told(tmp_path):
    for number in range(2):
        planted.drawn(1).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"zork number {number}")
    diagnosis = examine(scan(tmp_path, resolution=64, trigger_word="zork", hold_out=1))
    assert sorted(f.kind for f in diagnosis.findings) == ["near-duplicate", "twin in training"]
    assert diagnosis.clusters and set(diagnosis.clusters[0]) == {tmp_path / "0.png", tmp_path / "1.png"}


def test_pictures_that_are_the_same_once_painted_over_are_twins(tmp_path):
    mask = Image.new("L", (256, 256))
    mask.paste(255, (64, 64, 192, 192))
    for number in range(2):
        picture = planted.drawn(number + 2)
        picture.paste(planted.drawn(1).crop((64, 64, 192, 192)), (64, 64))
        picture.save(tmp_path / f"{number}.png")
        mask.save(tmp_path / f"{number}_mask.png")
    seen, painted = (scan(tmp_path, resolution=64, hold_out=1, fill_masked=fill) for fill in (False, True))
    assert examine(seen).clusters == ()
    assert "twin in training" in {finding.kind for finding in examine(painted).findings}


def test_another_split_needs_no_other_look(tmp_path, monkeypatch):
    for number in range(6):
        planted.drawn(max(1, number)).crop((0, 0, 256, 128 if number == 5 else 256)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"zork number {number}")
    dataset = scan(tmp_path, resolution=128, trigger_word="zork", hold_out=1)
    moved = sorted(dataset.examples + dataset.held_out, key=lambda example: example.path)
    first = replace(dataset, examples=tuple(moved[1:]), held_out=(moved[0],))
    second = replace(dataset, examples=tuple(moved[:5]), held_out=(moved[5],))
    one, other = examine(first), examine(second)
    assert one.findings != other.findings
    monkeypatch.setattr("lora_workbench.training.doctor.pictures.measure", lambda *_: pytest.fail("opened"))
    assert set(as_split(one, second).findings) == set(other.findings)


def test_regularization_pictures_are_not_examined(tmp_path):
    for number in range(4):
        planted.drawn(1).resize((20, 20)).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text("a woman")
    assert examine(scan(tmp_path, resolution=256, role="regularization")).findings == ()


def test_every_caption_of_a_picture_is_read(tmp_path):
    planted.drawn(1).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("zork on a chair\nThis image shows zork")
    diagnosis = examined(tmp_path, tokens=len)
    assert kinds(diagnosis, tmp_path / "a.png") == ["boiler-plate"]
    assert diagnosis.tokens == {tmp_path / "a.png": len("This image shows zork")}


def test_no_file_is_changed(good, tmp_path):
    planted.write_good(tmp_path, good[:4])
    planted.write_plants(tmp_path, good, times=1)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()}
    examined(tmp_path, resolution=256)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.iterdir()} == before


def test_a_picture_that_vanished_does_not_stop_the_others(tmp_path):
    for number in range(2):
        planted.drawn(number).save(tmp_path / f"{number}.png")
    dataset = scan(tmp_path, resolution=64)
    (tmp_path / "0.png").unlink()
    assert kinds(examine(dataset), tmp_path / "0.png") == ["unreadable", "no caption"]


def test_it_can_be_stopped(tmp_path):
    for number in range(3):
        planted.drawn(number).save(tmp_path / f"{number}.png")
    heard = []

    def stop(done, total):
        heard.append((done, total))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        examined(tmp_path, progress=stop)
    assert heard == [(1, 3)]
