import pytest
from PIL import Image

from lora_workbench.captioning.caption_file import read_caption
from lora_workbench.captioning.captioner import (
    FAILED,
    Answer,
    CaptioningStopped,
    Report,
    Told,
    caption_folder,
    summary,
)
from lora_workbench.captioning.text import clean, clean_tags
from lora_workbench.captioning.vision_language import VisionLanguageCaptioner


class Sizes:
    """Says how large a picture is, and remembers what it was shown; cannot bear pictures of the colours in ``bad``."""

    writes_tags = False

    def __init__(self, batch_size=1, bad=(), error=None):
        self.batch_size, self.bad = batch_size, bad
        self.error = error or RuntimeError("out of memory")
        self.shown, self.batches, self.closed = [], [], 0

    def caption(self, images, instruction):
        self.batches.append((len(images), instruction))
        if any(image.getpixel((0, 0)) in self.bad for image in images):
            raise self.error
        self.shown += images
        return [Answer(f"{image.width} by {image.height}") for image in images]

    def close(self):
        self.closed += 1


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.png")]
    for path in paths:
        Image.new("RGB", (8, 6), "red").save(path)
    return paths


def test_missing_captions_are_written_and_yours_are_kept(pictures):
    yours = pictures[1].with_suffix(".txt")
    yours.write_bytes(b"my own words\r\n")
    captioner = Sizes()
    reports = list(caption_folder(pictures, captioner))
    assert summary(reports) == "2 written, 1 kept (yours), 0 failed"
    assert yours.read_bytes() == b"my own words\r\n"
    assert len(captioner.shown) == 2
    assert [report.caption for report in reports] == ["8 by 6", "my own words", "8 by 6"]


def test_a_second_run_does_nothing(pictures):
    list(caption_folder(pictures, Sizes()))
    again = Sizes()
    assert summary(caption_folder(pictures, again)) == "0 written, 3 kept (yours), 0 failed"
    assert again.shown == []


def test_one_bad_picture_is_named_and_the_rest_goes_on(pictures):
    pictures[0].write_bytes(b"not a picture")
    reports = list(caption_folder(pictures, Sizes()))
    assert summary(reports).startswith("2 written, 0 kept (yours), 1 failed: a.png: the picture cannot be read")
    assert not pictures[0].with_suffix(".txt").exists()


def test_a_caption_file_that_cannot_be_read_is_named_and_left_alone(pictures, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    pictures[1].with_suffix(".txt").write_text("mine")
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    reports = list(caption_folder(pictures, Sizes()))
    assert [report.outcome for report in reports] == ["written", "failed", "written"]
    assert "Permission denied" in reports[1].reason
    assert pictures[1].with_suffix(".txt").read_text() == "mine"


def test_pictures_are_opened_as_the_caller_opens_them(pictures):
    captioner = Sizes()
    list(caption_folder(pictures[:1], captioner, open_image=lambda path: Image.new("RGB", (3, 2))))
    assert read_caption(pictures[0]) == "3 by 2"


def test_nothing_to_say_writes_no_file(pictures):
    silent = VisionLanguageCaptioner(lambda image, instruction: "")
    assert summary(caption_folder(pictures[:1], silent)).endswith(
        "1 failed: a.png: the captioner had nothing to say about it"
    )
    assert summary(caption_folder(pictures[:1], Told("no word"))).endswith("a.png: no word")
    assert not pictures[0].with_suffix(".txt").exists()


def test_pictures_that_failed_alike_are_named_together(tmp_path):
    reports = [Report(tmp_path / f"{number}.png", FAILED, reason="no word") for number in range(5)]
    reports.append(Report(tmp_path / "x.png", FAILED, reason="too dark"))
    assert summary(reports).endswith("6 failed: 0.png, 1.png, 2.png and 2 more: no word; x.png: too dark")


def test_stopping_keeps_what_is_done(pictures):
    captioner = Sizes()
    reports = caption_folder(pictures, captioner)
    next(reports)
    reports.close()
    assert [bool(read_caption(path)) for path in pictures] == [True, False, False]
    assert captioner.closed == 1


@pytest.mark.parametrize(("batch_size", "batches"), [(1, [1, 1, 1]), (2, [2, 1]), (3, [3]), (8, [3])])
def test_a_captioner_gets_as_many_pictures_at_once_as_it_wants(pictures, batch_size, batches):
    captioner = Sizes(batch_size)
    reports = list(caption_folder(pictures, captioner))
    assert [size for size, _ in captioner.batches] == batches
    assert [report.path for report in reports] == pictures and captioner.closed == 1


def test_a_bad_picture_does_not_lose_its_batch(pictures):
    Image.new("RGB", (8, 6), "blue").save(pictures[1])
    captioner = Sizes(3, bad=[(0, 0, 255)])
    assert summary(caption_folder(pictures, captioner)) == "2 written, 0 kept (yours), 1 failed: b.png: out of memory"
    assert [size for size, _ in captioner.batches] == [3, 1, 1, 1]


def test_a_batch_with_too_few_answers_is_asked_for_one_by_one(pictures):
    class Lazy(Sizes):
        def caption(self, images, instruction):
            return super().caption(images, instruction)[:1]

    assert summary(caption_folder(pictures, Lazy(3))) == "3 written, 0 kept (yours), 0 failed"


def test_pictures_with_a_question_of_their_own_are_asked_apart(pictures):
    captioner = Sizes(3)
    list(caption_folder(pictures, captioner, instruction=lambda path: "first" if path == pictures[0] else "others"))
    assert captioner.batches == [(1, "first"), (2, "others")]


def test_a_captioner_that_cannot_go_on_ends_the_run_and_keeps_what_is_done(pictures):
    Image.new("RGB", (8, 6), "blue").save(pictures[1])
    captioner = Sizes(bad=[(0, 0, 255)], error=CaptioningStopped("the key is refused"))
    with pytest.raises(CaptioningStopped, match="the key is refused"):
        list(caption_folder(pictures, captioner))
    assert [bool(read_caption(path)) for path in pictures] == [True, False, False]
    assert captioner.closed == 1


def test_an_interrupt_is_not_a_failed_picture(pictures):
    captioner = Sizes(bad=[(255, 0, 0)], error=KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        list(caption_folder(pictures, captioner))
    assert captioner.closed == 1


def test_pictures_are_shown_upright_and_on_white(tmp_path):
    turned = Image.new("RGB", (8, 6), "red")
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    captioner = Sizes()
    list(caption_folder([tmp_path / "turned.jpg", tmp_path / "clear.png"], captioner))
    assert captioner.shown[0].size == (6, 8)
    assert captioner.shown[1].getpixel((0, 0)) == (255, 255, 255)


def test_an_unknown_mode_is_refused(pictures):
    with pytest.raises(ValueError, match="Choose one of: only missing"):
        list(caption_folder(pictures, Sizes(), mode="all"))


def test_an_answer_becomes_a_caption_as_the_caller_wants_it(pictures):
    captioner = VisionLanguageCaptioner(lambda image, instruction: f"Sure! Here are the words: {instruction}, fox")
    finishes = {pictures[0]: clean_tags, pictures[1]: clean}
    for _ in caption_folder(
        pictures[:2],
        captioner,
        instruction=lambda path: "fox",
        finish=lambda path, answer: finishes[path](answer),
    ):
        pass
    assert [read_caption(path) for path in pictures[:2]] == ["fox", "fox, fox"]


def test_a_refusal_is_reported_in_the_words_of_the_model(pictures):
    captioner = VisionLanguageCaptioner(lambda image, instruction: "I'm sorry, I can't.\nReally.")
    assert summary(caption_folder(pictures[:1], captioner)).endswith(
        "a.png: the model refused: I'm sorry, I can't. Really."
    )
