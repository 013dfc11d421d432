import pytest
from captioners import Sizes, Telling, caption_folder
from PIL import Image

from lora_workbench.captioning.caption_file import read_caption
from lora_workbench.captioning.caption_log import AUTOMATIC, LOG_NAME, REVIEWED, YOURS
from lora_workbench.captioning.captioner import (
    FAILED,
    CaptioningStopped,
    Report,
    Told,
    summary,
)
from lora_workbench.captioning.finish import Finish
from lora_workbench.captioning.request import Request
from lora_workbench.captioning.sidecar import BACKUPS_NAME, CaptionStore, undo
from lora_workbench.captioning.style import TAGS
from lora_workbench.captioning.vision_language import VisionLanguageCaptioner


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
    before = {path: path.stat().st_mtime_ns for path in pictures[0].parent.rglob("*")}
    assert summary(caption_folder(pictures, again)) == "0 written, 3 kept (automatic), 0 kept (yours), 0 failed"
    assert again.shown == []
    assert {path: path.stat().st_mtime_ns for path in pictures[0].parent.rglob("*")} == before


def test_one_bad_picture_is_named_and_the_rest_goes_on(pictures):
    pictures[0].write_bytes(b"not a picture")
    reports = list(caption_folder(pictures, Sizes()))
    assert summary(reports).startswith("2 written, 0 kept (yours), 1 failed: a.png: cannot be read as a picture")
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
    list(
        caption_folder(pictures, captioner, request=lambda path: Request("first" if path == pictures[0] else "others"))
    )
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
    with pytest.raises(ValueError, match="Choose one of: only missing, replace automatic"):
        list(caption_folder(pictures, Sizes(), mode="all"))


def test_an_answer_becomes_a_caption_as_it_is_wanted(pictures):
    captioner = VisionLanguageCaptioner(lambda image, instruction: f"Sure! Here are the words: {instruction}, fox")
    wanted = {pictures[0]: Request("fox", Finish(TAGS), "ohwx"), pictures[1]: Request("a fox", trigger="ohwx")}
    list(caption_folder(wanted, captioner, request=wanted.get))
    assert [read_caption(path) for path in wanted] == ["ohwx, fox", "ohwx, a fox, fox"]


def test_a_refusal_is_reported_in_the_words_of_the_model(pictures):
    captioner = VisionLanguageCaptioner(lambda image, instruction: "I'm sorry, I can't.\nReally.")
    assert summary(caption_folder(pictures[:1], captioner)).endswith(
        "a.png: nothing is left of what the captioner said: I'm sorry, I can't. Really."
    )


# Modes


def caption(pictures, mode, said="new", by="settings 1", **changes):
    """Caption with a captioner that always says the same, and how often it was asked."""
    captioner = Telling(said)
    wanted = Request(by=by, **changes)
    reports = list(caption_folder(pictures, captioner, mode, request=lambda path: wanted))
    return summary(reports), len(captioner.batches)


@pytest.fixture
def mixed(pictures):
    """Pictures whose captions are automatic, yours, reviewed and missing."""
    with CaptionStore() as store:
        store.write(pictures[0], "automatic", state=AUTOMATIC, by="settings 0")
        store.write(pictures[2], "reviewed", state=AUTOMATIC, by="settings 0")
        store.mark_reviewed(pictures[2])
    pictures[1].with_suffix(".txt").write_bytes("müde".encode("utf-16"))
    Image.new("RGB", (8, 6), "red").save(pictures[0].with_name("d.png"))
    return [*pictures, pictures[0].with_name("d.png")]


@pytest.mark.parametrize(
    ("mode", "report", "captions"),
    [
        ("only missing", "1 written, 1 kept (automatic), 2 kept (yours)", "automatic|müde|reviewed|new"),
        ("replace automatic", "2 written, 2 kept (yours)", "new|müde|reviewed|new"),
        ("add after", "4 written, 0 kept (yours)", "automatic, new|müde, new|reviewed, new|new"),
        ("replace everything", "4 written, 0 kept (yours)", "new|new|new|new"),
    ],
)
def test_each_mode_changes_what_it_says_and_a_second_run_does_nothing(mixed, mode, report, captions):
    assert caption(mixed, mode)[0] == f"{report}, 0 failed"
    assert "|".join(map(read_caption, mixed)) == captions
    files = {path: path.read_bytes() for path in mixed[0].parent.rglob("*") if path.is_file()}
    summed, asked = caption(mixed, mode)
    assert summed.startswith("0 written") and asked == 0
    assert {path: path.read_bytes() for path in mixed[0].parent.rglob("*") if path.is_file()} == files


def test_words_that_are_added_to_do_not_become_automatic(mixed):
    caption(mixed, "add after")
    assert [CaptionStore().state(path) for path in mixed] == [AUTOMATIC, YOURS, YOURS, AUTOMATIC]
    caption(mixed, "replace automatic", said="newer", by="settings 2")
    assert list(map(read_caption, mixed)) == ["newer", "müde, new", "reviewed, new", "newer"]


def test_every_run_can_be_undone_to_the_byte(mixed):
    before = {path: path.read_bytes() for path in mixed[0].parent.glob("*.txt")}
    states = [CaptionStore().state(path) for path in mixed]
    caption(mixed, "replace everything")
    assert CaptionStore().state(mixed[2]) == AUTOMATIC != REVIEWED
    undo([mixed[0].parent])
    assert {path: path.read_bytes() for path in mixed[0].parent.glob("*.txt")} == before
    assert [CaptionStore().state(path) for path in mixed] == states


def test_other_settings_write_automatic_captions_anew_and_the_same_text_touches_no_file(pictures):
    caption(pictures, "replace automatic")
    before = [path.with_suffix(".txt").stat().st_mtime_ns for path in pictures]
    summed, asked = caption(pictures, "replace automatic", by="settings 2")
    assert summed == "0 written, 3 kept (automatic), 0 kept (yours), 0 failed" and asked == 3
    assert [path.with_suffix(".txt").stat().st_mtime_ns for path in pictures] == before
    assert caption(pictures, "replace automatic", by="settings 2")[1] == 0


def test_a_corrupt_log_makes_every_caption_yours(pictures):
    caption(pictures, "only missing")
    (pictures[0].parent / LOG_NAME).write_text("{")
    assert caption(pictures, "replace automatic", by="settings 2")[0] == "0 written, 3 kept (yours), 0 failed"


def test_additions_go_to_every_caption_of_a_file_without_the_trigger_word_or_a_tag_twice(pictures):
    pictures[0].with_suffix(".txt").write_text("ohwx sits.\nred coat, ohwx")
    rules = {"finish": Finish(TAGS), "trigger": "ohwx", "class_word": "woman"}
    caption(pictures[:1], "add after", said="Red coat, snow", **rules)
    assert read_caption(pictures[0]) == "ohwx sits. Red coat, snow\nred coat, ohwx, snow"


def test_a_caption_that_a_picture_has_elsewhere_is_yours(pictures):
    assert caption(pictures[:1], "only missing", known="from a table")[0] == "0 written, 1 kept (yours), 0 failed"
    assert caption(pictures[:1], "replace automatic", known="from a table")[0].endswith("1 kept (yours), 0 failed")
    assert not pictures[0].with_suffix(".txt").exists()
    assert caption(pictures[:1], "add after", known="from a table")[0].startswith("1 written")
    assert read_caption(pictures[0]) == "from a table, new"


def test_stopping_in_a_batch_keeps_all_of_it(pictures):
    reports = caption_folder(pictures, Sizes(2))
    next(reports)
    reports.close()
    assert [bool(read_caption(path)) for path in pictures] == [True, True, False]
    assert CaptionStore().state(pictures[1]) == AUTOMATIC


def test_a_first_run_leaves_nothing_but_captions_that_a_folder_shows(pictures):
    list(caption_folder(pictures, Sizes()))
    hidden = {path.name for path in pictures[0].parent.iterdir() if path.name.startswith(".")}
    assert hidden == {LOG_NAME, BACKUPS_NAME}
