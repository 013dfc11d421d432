from dataclasses import replace

import pytest
from pictures import draw

from lora_workbench.training.class_words import class_text, classes_of, with_class_words
from lora_workbench.training.dataset import REGULARIZATION, joined
from lora_workbench.training.folder import scan


@pytest.fixture
def folder(tmp_path):
    """Two pictures of "zork woman" and one of "blip", in folders as sd-scripts names them."""
    draw(tmp_path / "2_zork woman" / "a.png", caption="zork in a park, smiling")
    draw(tmp_path / "2_zork woman" / "b.png", caption="a portrait of Zork woman")
    return tmp_path


def dataset_of(folder, trigger_word="zork", **settings):
    return scan(folder, trigger_word=trigger_word, **settings)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("zork in a park", "woman in a park"),
        ("a photo of Zork, smiling", "a photo of woman, smiling"),
        ("zork woman in a park", "woman in a park"),
        ("zork  Woman, zork, a woman", "woman, woman, a woman"),
        ("zork womanly", "woman womanly"),
        ("zorks and azork", None),
        ("a park", None),
        ("", None),
    ],
)
def test_class_words_stand_for_the_trigger_word_alone(text, expected):
    assert class_text(text, {"zork": "woman"}) == expected


def test_trigger_words_of_all_concepts_are_replaced_the_longest_first():
    classes = {"zork": "woman", "zork hat": "hat", r"b\1": r"\g<0> dog"}
    assert class_text(r"zork with zork hat and b\1", classes) == r"woman with hat and \g<0> dog"


def test_the_class_is_what_the_folder_says_beside_the_trigger_word(folder):
    assert classes_of(dataset_of(folder)) == {"zork": "woman"}
    assert classes_of(dataset_of(folder, "sks")) == {"sks": "zork woman"}


def test_words_that_are_typed_are_the_class_of_every_concept_and_of_no_regularization_picture(folder, tmp_path):
    draw(tmp_path / "other" / "1_dog" / "c.png", caption="a dog")
    regularization = scan(tmp_path / "other", role=REGULARIZATION)
    whole = joined([dataset_of(folder), regularization])
    told = with_class_words(whole, "  young\n person ")
    assert classes_of(told) == {"zork": "young person"}
    assert [e.class_words for e in told.examples if e.role == REGULARIZATION] == ["dog"]
    assert with_class_words(whole, " ") is whole


def test_several_concepts_have_a_class_each(folder, tmp_path):
    draw(tmp_path / "other" / "1_blip dog" / "c.png", caption="blip with zork")
    whole = joined([dataset_of(folder), scan(tmp_path / "other", trigger_word="blip")])
    assert classes_of(whole) == {"zork": "woman", "blip": "dog"}


def test_a_class_that_nobody_has_said_is_asked_for_with_the_place_to_type_it(tmp_path):
    draw(tmp_path / "plain" / "a.png", caption="in a park")
    for nothing in (
        scan(tmp_path / "plain", trigger_word="zork"),
        scan(tmp_path, trigger_word="zork", sub_folders="all"),
    ):
        with pytest.raises(ValueError, match=r"what 'zork' is: type its class.*class_words of LoRA Training Settings"):
            classes_of(nothing)


def test_the_trigger_word_itself_is_no_class(tmp_path):
    draw(tmp_path / "5_zork" / "a.png", caption="in a park")
    with pytest.raises(ValueError, match="what 'zork' is"):
        classes_of(scan(tmp_path, trigger_word="zork"))


def test_a_concept_without_a_trigger_word_is_named(folder):
    dataset = dataset_of(folder)
    nameless = replace(dataset, examples=(dataset.examples[0], replace(dataset.examples[1], trigger_word="")))
    with pytest.raises(ValueError, match=r"b\.png has none: type a trigger_word in LoRA Dataset Loader"):
        classes_of(nameless)
