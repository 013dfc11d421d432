"""Rows as JSON, tags in a prompt and entries of a stack: what is read, and what is refused with a sentence."""

import json
import time

import pytest

from lora_workbench.nodes.lora_rows import LoraRow, json_rows, prompt_rows, stack_rows, widget_rows

pytestmark = pytest.mark.comfy


def test_a_row_says_which_lora_at_which_strengths_and_what_is_left_out_is_the_recommended():
    rows = [
        {"lora": "people/a.safetensors", "model": 0.8, "clip": 0, "on": False, "blocks": "MID=0"},
        {"lora": "b.safetensors", "model": None, "on": None, "collapsed": True},
        {"lora": "none", "model": 1},
        {"lora": ""},
    ]
    assert json_rows(json.dumps(rows)) == [
        LoraRow("people/a.safetensors", 0.8, 0.0, False, "MID=0"),
        LoraRow("b.safetensors", None, None),
    ]


@pytest.mark.parametrize("text", ["", "[]", None])
def test_no_rows_are_none(text):
    assert json_rows(text) == []


@pytest.mark.parametrize("text", ["{}", "[", "7", '"a"', "[" * 100_000, '[{"lora": "a"}] and more'])
def test_what_is_no_list_in_json_is_refused(text):
    with pytest.raises(ValueError, match="^rows must be a list in JSON, such as .*: correct it, or empty it"):
        json_rows(text)


@pytest.mark.parametrize(
    "row, said",
    [
        (7, "must say which LoRA at which strength"),
        ({"lora": 7}, "has a lora or blocks that is no text"),
        ({"lora": "a", "blocks": [1]}, "has a lora or blocks that is no text"),
        ({"lora": "a", "model": "0.8"}, "has 'model' of '0.8', which is no strength"),
        ({"lora": "a", "clip": True}, "has 'clip' of True, which is no strength"),
        ({"lora": "a", "clip": float("nan")}, "has 'clip' of nan, which is no strength"),
        ({"lora": "a", "clip": float("inf")}, "has 'clip' of inf, which is no strength"),
        ({"lora": "a", "clip": 1e300}, r"has 'clip' of 1e\+300, which is no strength"),
        ({"lora": "a", "model": 10**400}, "has 'model' of 1000000000000000000000000000000000000000, which is no"),
    ],
)
def test_a_row_that_is_none_is_named(row, said):
    with pytest.raises(ValueError, match=f"^Row 2 of rows {said}"):
        json_rows(json.dumps([{"lora": "fine.safetensors"}, row]))


def test_the_first_rows_work_through_the_api_with_nothing_but_a_name():
    assert widget_rows({"lora_2": "a.safetensors", "lora_3": "none", "lora_4": "b.safetensors", "on_4": False}) == [
        LoraRow("a.safetensors", 1.0, 1.0),
        LoraRow("b.safetensors", 1.0, 1.0, on=False),
    ]


@pytest.mark.parametrize(
    "prompt, rest, rows",
    [
        ("a star <lora:star:0.8:0.6>", "a star", [("star", 0.8, 0.6)]),
        ("<lora:star:0.8> a star", "a star", [("star", 0.8, 0.8)]),
        ("a star, <lora:star>, at night", "a star, at night", [("star", None, None)]),
        ("a <lora:people/star.safetensors:-.5:1e-1>star", "a star", [("people/star.safetensors", -0.5, 0.1)]),
        ("a star,<lora:one:1><lora:two:0>", "a star", [("one", 1.0, 1.0), ("two", 0.0, 0.0)]),
        ("a star, <lora:one:1>, <LORA: two : 0.5 >, big", "a star, big", [("one", 1.0, 1.0), ("two", 0.5, 0.5)]),
        ("one line <lora:one:1>\nanother", "one line\nanother", [("one", 1.0, 1.0)]),
        ("<lora:one:1>", "", [("one", 1.0, 1.0)]),
        ("big,\n<lora:one:1>, a star,<lora:two:1>\nred", "big,\na star,\nred", [("one", 1.0, 1.0), ("two", 1.0, 1.0)]),
        ("a star <lora:none:1> here", "a star here", []),
    ],
)
def test_tags_are_read_and_removed(prompt, rest, rows):
    assert prompt_rows(prompt) == ([LoraRow(*row) for row in rows], rest)


@pytest.mark.parametrize("prompt", ["  two  spaces , and\n\n(lines:1.2) ", "a <b:c> (lora:x:1)", ""])
def test_a_prompt_without_tags_stays_as_it_is(prompt):
    assert prompt_rows(prompt) == ([], prompt)


def test_a_long_prompt_with_many_spaces_and_commas_is_read_at_once():
    prompts = ["<lora:x:1> a" + filling * 20_000 + "b" for filling in (" ", ", ", "<lora:", "<lora:y", "\t ,")]
    began = time.perf_counter()
    assert [rows for rows, _ in map(prompt_rows, prompts)] == [[LoraRow("x", 1.0, 1.0)]] * 5
    assert time.perf_counter() - began < 2


def test_no_prompt_is_an_empty_one():
    assert prompt_rows(None) == ([], "")


@pytest.mark.parametrize(
    "tag", ["<lora:a:b>", "<lora:a:1:2:3>", "<lora:a:nan>", "<lora:a:1:inf>", "<lora:a:>", "<lora:a:1e300>"]
)
def test_a_tag_whose_strength_is_no_number_is_named(tag):
    with pytest.raises(ValueError, match=f"^The prompt has the tag {tag}, which must say <lora:name:0.8> or"):
        prompt_rows(f"a star {tag}")


def test_entries_of_a_stack_may_be_tuples_or_lists_and_name_nothing():
    stack = [("a.safetensors", 1, 0.5), ["b.safetensors", 0, 1], ("None", 1.0, 1.0), ["none", 1, 1], (None, 1, 1)]
    assert stack_rows(stack) == [LoraRow("a.safetensors", 1.0, 0.5), LoraRow("b.safetensors", 0.0, 1.0)]


@pytest.mark.parametrize("strength", [float("nan"), float("inf"), 1e300, -101])
def test_a_strength_that_another_node_made_and_no_lora_can_have_is_refused(strength):
    with pytest.raises(ValueError, match="^'a.safetensors' is asked for at strength .*: connect or write a number"):
        stack_rows([("a.safetensors", 1.0, strength)])
    with pytest.raises(ValueError, match="^'a.safetensors' is asked for at strength "):
        widget_rows({"lora_1": "a.safetensors", "strength_model_1": strength})
