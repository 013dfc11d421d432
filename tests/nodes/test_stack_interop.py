"""LoRA Stack Apply among other packs: their stacks, moved and missing files, prompts, recommended strengths."""

import copy
import json

import folder_paths
import pytest
import queueing
from safetensors.torch import load_file, save_file
from stacktoys import apply, chained, execute, weights, write

from lora_workbench.nodes.stack_apply import ERROR, SKIP, LoraWorkbenchStackApply
from lora_workbench.training.description import STRENGTH

pytestmark = pytest.mark.comfy
NAMES = ("one.safetensors", "people/two.safetensors", "people/close/three.safetensors")
RECOMMENDED = {NAMES[1]: "0.85"}


@pytest.fixture
def folder(tmp_path, monkeypatch, comfyui):
    """Three small files; the second recommends a strength and each has a trigger word."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    for seed, name in enumerate(NAMES):
        said = {"modelspec.trigger_phrase": f"word{seed}", STRENGTH: RECOMMENDED.get(name, "")}
        write(tmp_path, name, "sdxl", seed, metadata=said, every=25)
    return tmp_path


def sdxl():
    return queueing.shared_models("sdxl")[:2]


def equals_chain(result, rows):
    theirs = chained(*sdxl(), rows)
    return weights(result["model"]) == weights(theirs[0]) and weights(result["clip"].patcher) == weights(
        theirs[1].patcher
    )


def rows_of(*rows):
    return json.dumps([dict(zip(("lora", "model", "clip", "on"), row, strict=False)) for row in rows])


# Stacks as other packs make them


STACKS = {
    # A list of tuples, "None" where a row is empty.
    "Efficiency": ([("one.safetensors", 0.8, 0.6), ("None", 1.0, 1.0), ("people/two.safetensors", 1.0, 1.0)], [0, 1]),
    # Its own rows behind what came in, lists where the stack came through JSON.
    "Comfyroll": (
        [["people/close/three.safetensors", 0.5, 0.5], ["None", 0, 0], ["one.safetensors", 1, 0.25]],
        [2, 0],
    ),
    # The system's separator, which is a backslash on Windows; names that came from a text.
    "Lora-Manager": ([("people\\two.safetensors", 0.7, 0.7), ("people\\close\\three.safetensors", -1.0, 1.0)], [1, 2]),
}


@pytest.mark.parametrize("pack", STACKS)
def test_a_stack_of_another_pack_is_the_chain_of_its_entries_in_their_order(pack, folder):
    stack, which = STACKS[pack]
    before, named = copy.deepcopy(stack), [entry for entry in stack if entry[0] != "None"]
    expected = [(NAMES[number], *entry[1:]) for number, entry in zip(which, named, strict=True)]
    result = apply(*sdxl(), stack)
    assert equals_chain(result, expected)
    assert stack == before
    assert result["lora_stack"] == expected
    assert all(type(entry) is tuple and list(map(type, entry)) == [str, float, float] for entry in result["lora_stack"])


@pytest.mark.parametrize("pack", STACKS)
def test_an_entry_that_is_gone_is_an_error_or_skipped_as_the_user_wants(pack, folder):
    stack, which = STACKS[pack]
    gone = [*stack[:1], ("old\\gone.safetensors", 1.0, 1.0), *stack[1:]]
    with pytest.raises(ValueError, match=r"^The LoRA 'old\\gone.safetensors' is not in the loras folder"):
        apply(*sdxl(), gone)
    result = apply(*sdxl(), gone, missing=SKIP)
    assert result["lora_stack"] == apply(*sdxl(), stack)["lora_stack"]
    assert result["report"].startswith("Left out: The LoRA 'old\\gone.safetensors' is not in the loras folder.")


@pytest.mark.parametrize("others", [(), ("other.safetensors",)], ids=["at the end", "before another node"])
def test_what_it_hands_on_is_a_stack_again(others, folder):
    for name in others:
        write(folder, name, "sdxl", 9, metadata={}, every=25)
    first = apply(*sdxl(), [(NAMES[0], 0.5, 0.5)], rows=rows_of((NAMES[1], 0.2, 0.3)))
    again = apply(*sdxl(), [*first["lora_stack"], *((name, 1.0, 1.0) for name in others)])
    assert equals_chain(again, [(NAMES[0], 0.5, 0.5), (NAMES[1], 0.2, 0.3), *((name, 1.0, 1.0) for name in others)])


# Files that were moved, or are gone


@pytest.mark.parametrize("policy", [ERROR, SKIP])
@pytest.mark.parametrize("depth", ["short", "off"])
def test_a_file_that_was_moved_is_taken_and_said(policy, depth, folder):
    result = apply(*sdxl(), [("old/two.safetensors", 0.5, 0.5)], missing=policy, xray=depth)
    assert equals_chain(result, [(NAMES[1], 0.5, 0.5)])
    assert result["lora_stack"] == [(NAMES[1], 0.5, 0.5)]
    assert "'old/two.safetensors' was found as 'people/two.safetensors'" in result["report"]


def test_missing_rows_are_refused_when_they_are_queued_unless_they_are_skipped(folder):
    check = LoraWorkbenchStackApply.validate_inputs
    gone, moved, off = (
        rows_of(("gone.safetensors", 1)),
        rows_of(("old/two.safetensors", 1)),
        rows_of(("gone", 1, 1, False)),
    )
    assert check(rows=moved) is True and check(rows=off) is True
    assert check(rows=gone).startswith("The LoRA 'gone.safetensors' is not in the loras folder. Put the file back, or")
    assert check(rows=gone, missing=SKIP) is True
    assert check(lora_1="gone.safetensors", missing=SKIP) is True
    assert "such as 'one.safetensors'" in check(rows=rows_of(("oone.safetensors", 1)))
    assert check(rows="{").startswith("rows must be a list in JSON")
    assert "is not the name of a LoRA file" in check(rows=rows_of(("../one.safetensors", 1)), missing=SKIP)


def test_skipped_rows_leave_the_others_as_they_are(folder):
    result = apply(*sdxl(), None, rows=rows_of((NAMES[0], 0.5, 0.5), ("gone.safetensors", 1, 1)), missing=SKIP)
    assert equals_chain(result, [(NAMES[0], 0.5, 0.5)])
    assert result["lora_stack"] == [(NAMES[0], 0.5, 0.5)]


# Strengths, trigger words, prompts


def test_a_row_without_a_strength_takes_the_recommended_one_else_1(folder):
    result = apply(*sdxl(), None, rows=rows_of((NAMES[1],), (NAMES[0],), (NAMES[2], None, 0.25)))
    expected = [(NAMES[1], 0.85, 0.85), (NAMES[0], 1.0, 1.0), (NAMES[2], 1.0, 0.25)]
    assert result["lora_stack"] == expected
    assert equals_chain(result, expected)
    assert "recommended 0.85" in result["report"]


def test_strengths_are_settled_in_the_stack_also_where_nothing_is_applied(folder):
    result = apply(sdxl()[0], None, None, rows=rows_of((NAMES[1], 0.0)))
    assert result["lora_stack"] == [(NAMES[1], 0.0, 0.85)]


def test_trigger_words_are_those_of_what_is_applied_in_order(folder):
    rows = rows_of((NAMES[2], 1, 1), (NAMES[0], 1, 1, False), (NAMES[1], 0, 0))
    assert apply(*sdxl(), [(NAMES[1], 1, 1)], rows=rows)["trigger_words"] == "word1, word2"


def test_tags_of_a_prompt_come_last_and_are_removed(folder):
    result = apply(
        *sdxl(),
        [(NAMES[0], 0.1, 0.1)],
        rows=rows_of((NAMES[1], 0.2, 0.2)),
        prompt="a star, <lora:three:0.3:0.4>, <lora:people/two> big",
    )
    expected = [(NAMES[0], 0.1, 0.1), (NAMES[1], 0.2, 0.2), (NAMES[2], 0.3, 0.4), (NAMES[1], 0.85, 0.85)]
    assert result["prompt"] == "a star, big"
    assert result["lora_stack"] == expected
    assert equals_chain(result, expected)


def test_a_tag_that_names_no_file_follows_the_same_policy(folder):
    with pytest.raises(ValueError, match="^The LoRA 'gone' is not in the loras folder"):
        apply(*sdxl(), prompt="a star <lora:gone:1>")
    result = apply(*sdxl(), prompt="a star <lora:gone:1>", missing=SKIP)
    assert (result["prompt"], result["lora_stack"]) == ("a star", [])


def test_without_a_prompt_the_prompt_is_empty(folder):
    assert apply(*sdxl())["prompt"] == ""


# What the panel is told


def test_the_table_of_the_panel_is_plain_json_and_missing_where_there_is_nothing_to_show(folder):
    (table,) = execute(*sdxl(), [(NAMES[0], 0.5, 0.5), (NAMES[1], 1.0, 1.0)]).ui["lora_workbench_stack"]
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert [row["name"] for row in table["rows"]] == [NAMES[0], NAMES[1]]
    assert table.keys() == {"rows", "total", "guidance", "overlaps"}
    assert table["rows"][1]["recommended"] == 0.85
    assert not execute(*sdxl()).ui
    assert not execute(*sdxl(), [(NAMES[0], 0.5, 0.5)], xray="off").ui


# Files are read once


def test_another_strength_another_order_and_another_switch_read_nothing(folder, reads):
    apply(*sdxl(), [(NAMES[0], 1.0, 1.0)], rows=rows_of((NAMES[1], 1, 1), (NAMES[2], 1, 1)))
    assert sorted(reads) == ["one.safetensors", "three.safetensors", "two.safetensors"]
    del reads[:]
    changed = apply(*sdxl(), [(NAMES[0], 0.3, 0.6)], rows=rows_of((NAMES[1], 1, 1), (NAMES[2], 1, 1)))
    apply(*sdxl(), [(NAMES[0], 0.0, 0.0)], rows=rows_of((NAMES[1], 1, 1, False), (NAMES[2], 1, 1)))
    again = apply(*sdxl(), [(NAMES[0], 0.3, 0.6)], rows=rows_of((NAMES[1], 1, 1), (NAMES[2], 1, 1)))
    apply(*sdxl(), None, rows=rows_of((NAMES[2], 1, 1), (NAMES[0], 1, 1)))
    assert reads == []
    assert weights(changed["model"]) == weights(again["model"])
    assert equals_chain(again, [(NAMES[0], 0.3, 0.6), (NAMES[1], 1.0, 1.0), (NAMES[2], 1.0, 1.0)])


def test_a_file_that_was_written_anew_is_read_anew(folder, reads):
    stack = [(NAMES[0], 1.0, 1.0)]
    before = apply(*sdxl(), stack)
    mark = LoraWorkbenchStackApply.fingerprint_inputs(rows=rows_of(*stack))
    tensors = {name: 2 * tensor for name, tensor in load_file(folder / NAMES[0]).items()}
    (folder / NAMES[0]).unlink()
    save_file(tensors, folder / NAMES[0], {"note": "doubled"})
    after = apply(*sdxl(), stack)
    assert reads == ["one.safetensors"] * 2
    assert weights(after["model"]) != weights(before["model"])
    assert equals_chain(after, stack)
    assert LoraWorkbenchStackApply.fingerprint_inputs(rows=rows_of(*stack)) != mark
    assert json.loads(json.dumps(mark)) == mark and str(folder) not in json.dumps(mark)


def test_nothing_is_kept_of_files_that_no_node_names_any_more(folder, reads):
    apply(*sdxl(), [(NAMES[0], 1.0, 1.0), (NAMES[1], 1.0, 1.0)], node_id="7")
    apply(*sdxl(), [(NAMES[1], 1.0, 1.0)], node_id="8")
    del reads[:]
    apply(*sdxl(), None, node_id="7")
    apply(*sdxl(), [(NAMES[1], 1.0, 1.0)], node_id="7")
    assert reads == []
    apply(*sdxl(), [(NAMES[0], 1.0, 1.0)], node_id="7")
    assert reads == ["one.safetensors"]
