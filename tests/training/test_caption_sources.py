from unicodedata import normalize

import pytest
from pictures import draw

from lora_workbench.training.caption_sources import Captions, read_text
from lora_workbench.training.folder import scan


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_captions_are_read_in_the_encodings_people_have(tmp_path, encoding):
    path = tmp_path / "a.txt"
    path.write_bytes("café – “naïve” star\r\n".encode(encoding))
    assert read_text(path) == ("café – “naïve” star", encoding == "cp1252")


def test_bytes_that_are_text_in_no_encoding_do_not_stop_the_scan(tmp_path):
    draw(tmp_path / "1.png").with_suffix(".txt").write_bytes(b"star \x81\xff")
    assert scan(tmp_path).examples[0].caption.startswith("star")


def test_captions_are_kept_verbatim(tmp_path):
    caption = r"asuka \(evangelion\), (red:1.3), [from|to], embedding:x,  two  spaces"
    draw(tmp_path / "1.png", caption=caption)
    assert scan(tmp_path).examples[0].caption == caption
    assert scan(tmp_path, trigger_word="zork").examples[0].caption == "zork, " + caption


def test_caption_files_with_a_capital_suffix_are_found(tmp_path):
    draw(tmp_path / "1.png").with_suffix(".TXT").write_text("shouted")
    assert scan(tmp_path).examples[0].caption == "shouted"


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_captions_are_found_when_one_of_picture_and_caption_came_from_a_mac(tmp_path, forms):
    picture, caption = (tmp_path / normalize(form, "é.png") for form in forms)
    draw(picture)
    caption.with_suffix(".txt").write_text("a cafe")
    assert scan(tmp_path).examples[0].caption == "a cafe"


def test_a_caption_that_may_not_be_read_becomes_a_note(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    draw(tmp_path / "1.png", caption="x")
    monkeypatch.setattr("pathlib.Path.read_bytes", refuse)
    assert any(note.startswith("1.png: the caption file cannot be read (Permission") for note in scan(tmp_path).notes)


def one(folder):
    """The captions of a picture in the folder, as `scan` finds them."""
    draw(folder / "1.png")
    (example,) = (e for e in scan(folder, resolution=64).examples if e.path.name == "1.png")
    return [example.caption, *example.variants]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
@pytest.mark.parametrize("suffix", [".txt", ".caption"])
def test_text_beside_a_picture_is_its_caption_in_any_encoding(tmp_path, suffix, encoding):
    (tmp_path / f"1{suffix}").write_bytes("a müde Katze’s star".encode(encoding))
    assert one(tmp_path) == ["a müde Katze’s star"]
    notes = scan(tmp_path, resolution=64).notes
    told = "1.png: the caption is neither UTF-8 nor UTF-16 and was read as Windows-1252."
    assert notes == ((told,) if encoding == "cp1252" else ())


@pytest.mark.parametrize(
    "content, captions",
    [
        ('{"caption": "a star"}', ["a star"]),
        ('{"caption": "a star.", "tags": ["red", "blue"]}', ["a star, red, blue"]),
        ('{"tags": "red, blue"}', ["red, blue"]),
        ('{"tags": {"red": 0.9, "blue": 0.5}}', ["red, blue"]),
        ('{"captions": ["a star", "one star"], "seed": 3}', ["a star", "one star"]),
        ('["a star", "one star"]', ["a star", "one star"]),
        ('"a\\nstar"', ["a star"]),
        ('{"width": 3}', [""]),
        ("{not json", [""]),
    ],
)
def test_json_beside_a_picture_is_read(tmp_path, content, captions):
    (tmp_path / "1.json").write_text(content)
    assert one(tmp_path) == captions


def test_a_json_file_that_is_none_is_named(tmp_path):
    draw(tmp_path / "1.png").with_suffix(".json").write_text("{not json")
    assert scan(tmp_path, resolution=64).notes[0].startswith("1.png: the caption file is not JSON")


def test_several_lines_in_a_file_are_as_many_captions(tmp_path):
    draw(tmp_path / "1.png", caption="a star\n\n  one star \nthe zork\n")
    (example,) = (dataset := scan(tmp_path, resolution=64, trigger_word="zork")).examples
    assert (example.caption, example.variants) == ("zork, a star", ("zork, one star", "the zork"))
    assert dataset.notes == ("1.png: several lines in the caption file, each of which is a caption of its own.",)


TABLES = {
    "metadata.jsonl": '{"file_name": "1.png", "text": "a star"}\n\n{"file_name": "2.png", "tags": ["x", "y"]}\n',
    "metadata.csv": 'file_name,caption,tags\n1.png,"a star",\n2.png,,"x, y"\n',
    "excel.csv": "File Name;Caption;Tags\r\n1.png;a star;\r\n2.png;;x, y\r\n",
    "from_windows.csv": 'image,text\n"C:\\Users\\me\\1.png",a star\n.\\2.png,"x, y"\n',
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_tables_of_captions_are_read(tmp_path, name, encoding):
    (tmp_path / name).write_bytes(TABLES[name].encode(encoding))
    draw(tmp_path / "1.png"), draw(tmp_path / "2.png")
    dataset = scan(tmp_path, resolution=64)
    assert [e.caption for e in dataset.examples] == ["a star", "x, y"] and dataset.notes == ()


def test_rows_of_a_table_reach_into_sub_folders_and_may_say_several_things_about_one_picture(tmp_path):
    rows = ['{"file_name": "5_zork/ü.png", "text": "one"}', '{"file_name": "5_zork\\\\ü.png", "text": "two"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    draw(tmp_path / "5_zork" / "u\u0308.png")  # as macOS writes it
    (example,) = scan(tmp_path).examples
    assert (example.caption, example.variants) == ("one", ("two",))


def test_a_text_beside_a_picture_goes_before_a_table_and_that_before_the_text_for_all(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,caption\n1.png,row\n2.png,row\n")
    (tmp_path / "default.txt").write_text("for all")
    draw(tmp_path / "1.png", caption="own"), draw(tmp_path / "2.png"), draw(tmp_path / "3.png", caption="")
    dataset = scan(tmp_path)
    assert [e.caption for e in dataset.examples] == ["own", "row", "for all"] and dataset.uncaptioned == ()


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("metadata.jsonl", '{"file_name": "1.png"', "line 1 is not JSON"),
        ("prices.csv", "item,price\nstar,3\n", "it has no columns such as file_name and caption"),
        ("empty.csv", "", "it has no columns such as file_name and caption"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    draw(tmp_path / "1.png", caption="a star")
    (note,) = scan(tmp_path, resolution=64).notes
    assert note == f"The table {name} is not read ({said}): correct it or remove it."


def test_rows_about_pictures_that_are_not_there_are_counted(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,caption\n1.png,a\ngone.png,b\n../2.png,c\n")
    draw(tmp_path / "1.png")
    (note,) = scan(tmp_path, resolution=64).notes
    assert note == "2 rows of the tables name no picture here, e.g. gone.png in metadata.csv."


def test_captions_are_asked_for_by_path_and_nothing_else_is_opened(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,caption\n../secret.txt,x\n")
    captions = Captions([tmp_path / "metadata.csv"])
    assert captions.of(tmp_path / "1.png") == ([], "") and len(captions.unused()) == 1


def test_json_that_is_nested_without_end_is_named(tmp_path):
    draw(tmp_path / "1.png").with_suffix(".json").write_text("[" * 200_000)
    (tmp_path / "rows.jsonl").write_text("[" * 200_000)
    notes = "\n".join(scan(tmp_path).notes)
    assert "1.png: the caption file is not JSON" in notes
    assert "The table rows.jsonl is not read (line 1 is not JSON)" in notes
