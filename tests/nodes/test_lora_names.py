"""Which file a name means, and what is said of one that is not there."""

import pytest

from lora_workbench.nodes.lora_names import Found, found

pytestmark = pytest.mark.comfy
NAMES = [
    "one.safetensors",
    "people/two.safetensors",
    "people/close/three.safetensors",
    "style_v1.5.safetensors",
    "a/twin.safetensors",
    "b/twin.safetensors",
    "Upper.safetensors",
    "upper.safetensors",
]


@pytest.mark.parametrize(
    "name, meant",
    [
        ("one.safetensors", "one.safetensors"),
        ("people/two.safetensors", "people/two.safetensors"),
        ("people\\close\\three.safetensors", "people/close/three.safetensors"),
        ("one", "one.safetensors"),
        ("people/two", "people/two.safetensors"),
        ("two", "people/two.safetensors"),
        ("style_v1.5", "style_v1.5.safetensors"),
        ("a/twin", "a/twin.safetensors"),
        ("upper.safetensors", "upper.safetensors"),
        ("ONE.safetensors", "one.safetensors"),
    ],
)
def test_a_name_may_leave_out_folder_and_ending_and_use_either_separator(name, meant):
    assert found(name, NAMES) == Found(meant)


def test_on_windows_the_list_has_backslashes_and_a_stack_may_not():
    assert found("people/two.safetensors", ["people\\two.safetensors"]) == Found("people\\two.safetensors")


@pytest.mark.parametrize("name", ["old/two.safetensors", "two.safetensors", "old\\deep\\two.safetensors", "old/two"])
def test_a_file_that_was_moved_is_found_and_said(name):
    assert found(name, NAMES) == Found("people/two.safetensors", f"'{name}' was found as 'people/two.safetensors'")


@pytest.mark.parametrize(
    "name, such",
    [
        ("gone.safetensors", ", such as 'one.safetensors'"),
        ("people/thre.safetensors", ", such as 'people/close/three.safetensors'"),
        ("old/twin.safetensors", ", such as 'a/twin.safetensors' or 'b/twin.safetensors'"),
        ("xyzzy.safetensors", ""),
        ("style_v1.safetensors", ", such as 'style_v1.5.safetensors'"),
    ],
)
def test_of_a_file_that_is_not_there_the_closest_names_are_said(name, such):
    sentence = f"The LoRA '{name}' is not in the loras folder. Put the file back, or choose another one{such}."
    assert found(name, NAMES) == Found("", sentence)


@pytest.mark.parametrize(
    "name", ["../one.safetensors", "people/../../one", "/one.safetensors", "C:\\one.safetensors", "one\0.safetensors"]
)
def test_a_name_that_leaves_the_folder_is_none_even_if_a_file_is_called_so(name):
    with pytest.raises(ValueError, match="is not the name of a LoRA file. Choose one from the list"):
        found(name, NAMES)
