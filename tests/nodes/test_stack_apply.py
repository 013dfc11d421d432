"""LoRA Stack Apply: a stack is a chain of Load LoRA nodes (promise 11), and what it says when that cannot be."""

import copy
import json

import pytest
import queueing
import torch
from comfy_server import GraphRefused
from safetensors.torch import save_file
from stacktoys import ADAPTERS, DORA, KINDS, LOHA, LOKR, LORA, apply, chained, weights, write

import nodes
from lora_workbench.nodes.host import loras
from lora_workbench.nodes.stack_apply import LoraWorkbenchStackApply

pytestmark = pytest.mark.comfy
every_kind = pytest.mark.parametrize("kind", KINDS)
FILES = {
    "one.safetensors": (LORA,),
    "people/two.safetensors": (LOHA,),
    "people/close/three.safetensors": (LOKR,),
    "four.safetensors": (DORA,),
    "five.safetensors": ADAPTERS,
    "six.safetensors": (LORA,),
}
NAMES = tuple(FILES)
STRENGTHS = ((1.0, 1.0), (0.7, 0.35), (-0.4, 1.3), (1.15, 0.0), (0.5, 0.8), (0.0, 0.6))
TEXT_ENCODERS = ("lora_te1_", "lora_te2_")


@pytest.fixture
def write_all(folder):
    """Six files of all kinds, each for every third layer."""

    def written(kind, every=3):
        for seed, (name, adapters) in enumerate(FILES.items()):
            write(folder, name, kind, seed, adapters=adapters, every=every)

    return written


def as_json(rows):
    return json.dumps([{"lora": name, "model": on_model, "clip": on_clip} for name, on_model, on_clip in rows])


def picture(kind, model, clip):
    vae = queueing.shared_models(kind)[2]
    with torch.inference_mode():
        (positive,), (negative,) = (nodes.CLIPTextEncode().encode(clip, text) for text in ("a red circle", ""))
        (latent,) = nodes.EmptyLatentImage().generate(64, 64)
        (samples,) = nodes.KSampler().sample(model, 3, 4, 3.0, "euler", "simple", positive, negative, latent)
        return nodes.VAEDecode().decode(vae, samples)[0]


# 11. A stack equals chained LoraLoaders


@every_kind
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
def test_promise_11_a_stack_equals_chained_load_lora_nodes(kind, count, write_all):
    """LoRA, LoHa, LoKr, DoRA and a file of all four, from a stack, from the first rows and from the growing ones."""
    write_all(kind)
    rows = [(name, *strengths) for name, strengths in zip(NAMES, STRENGTHS, strict=True)][:count]
    model, clip, _ = queueing.shared_models(kind)
    incoming, own, more = rows[: count // 3], rows[count // 3 : 2 * count // 3], rows[2 * count // 3 :]
    stack = [(name.replace("/", separator), *rest) for (name, *rest), separator in zip(incoming, "/\\", strict=False)]
    ours = apply(model, clip, stack, *own, rows=as_json(more))
    theirs = chained(model, clip, rows)
    assert weights(ours["model"]) == weights(theirs[0]) != weights(model)
    assert weights(ours["clip"].patcher) == weights(theirs[1].patcher) != weights(clip.patcher)
    assert ours["model"].attachments == theirs[0].attachments
    assert ours["clip"].patcher.attachments == theirs[1].patcher.attachments


@every_kind
def test_promise_11_its_pictures_are_those_of_the_chain_and_the_model_stays_as_it_was(kind, write_all):
    write_all(kind)
    rows = [(name, *strengths) for name, strengths in zip(NAMES, STRENGTHS, strict=True)]
    model, clip, _ = queueing.shared_models(kind)
    bare = picture(kind, model, clip)
    ours = apply(model, clip, rows)
    drawn = picture(kind, ours["model"], ours["clip"])
    assert torch.equal(drawn, picture(kind, *chained(model, clip, rows)))
    assert not torch.equal(drawn, bare)
    assert torch.equal(picture(kind, model, clip), bare)


@every_kind
def test_it_also_equals_the_chain_on_a_model_that_others_patched_and_under_others(kind, write_all):
    write_all(kind, every=8)
    rows = [(name, *strengths) for name, strengths in zip(NAMES, STRENGTHS, strict=True)]
    model, clip, _ = queueing.shared_models(kind)
    ours = apply(*chained(model, clip, rows[:2]), rows[2:4])
    ours = chained(ours["model"], ours["clip"], rows[4:])
    assert weights(ours[0]) == weights(chained(model, clip, rows)[0])
    assert weights(ours[1].patcher) == weights(chained(model, clip, rows)[1].patcher)


@every_kind
def test_without_a_clip_it_equals_the_loader_for_models_only(kind, write_all):
    write_all(kind)
    model = queueing.shared_models(kind)[0]
    result = apply(model, None, None, (NAMES[0], 0.8, 0.5), (NAMES[1], 0.0, 1.0))
    with torch.inference_mode():
        (expected,) = nodes.LoraLoaderModelOnly().load_lora_model_only(model, NAMES[0], 0.8)
    assert weights(result["model"]) == weights(expected) != weights(model)
    assert result["clip"] is None
    assert "clip" not in result["report"]


@every_kind
def test_strength_0_leaves_that_side_as_it_was(kind, write_all):
    write_all(kind)
    model, clip, _ = queueing.shared_models(kind)
    for strengths in ((1.0, 0.0), (0.0, 1.0)):
        result, expected = (
            apply(model, clip, None, (NAMES[0], *strengths)),
            chained(model, clip, [(NAMES[0], *strengths)]),
        )
        assert weights(result["model"]) == weights(expected[0])
        assert weights(result["clip"].patcher) == weights(expected[1].patcher)
    nothing = apply(model, clip, None, (NAMES[0], 0.0, 0.0))
    assert nothing["model"] is model and nothing["clip"] is clip
    assert nothing["report"] == "one.safetensors: left out, its strength is 0"
    assert nothing["lora_stack"] == [(NAMES[0], 0.0, 0.0)]


# Stacks


def test_the_incoming_stack_is_never_changed_and_comes_first(write_all):
    write_all("sdxl")
    model, clip, _ = queueing.shared_models("sdxl")
    stack = [(NAMES[1], 0.5, 0.25)]
    before = copy.deepcopy(stack)
    result = apply(model, clip, stack, (NAMES[0], 1.0, 0.5))
    assert stack == before and result["lora_stack"] is not stack
    assert result["lora_stack"] == [(NAMES[1], 0.5, 0.25), (NAMES[0], 1.0, 0.5)]
    again = apply(model, clip, result["lora_stack"])
    assert weights(again["model"]) == weights(result["model"])


def test_each_file_is_read_once(write_all, reads):
    write_all("sdxl")
    model, clip, _ = queueing.shared_models("sdxl")
    rows = [(NAMES[1], 0.5, 0.5), (NAMES[1].replace("/", "\\"), 0.25, 0.25), (NAMES[0], 1.0, 1.0)]
    result = apply(model, clip, rows, (NAMES[1], 0.1, 0.1))
    assert reads == ["two.safetensors", "one.safetensors"]
    assert weights(result["model"]) == weights(
        chained(model, clip, [*rows[:1], (NAMES[1], 0.25, 0.25), *rows[2:], (NAMES[1], 0.1, 0.1)])[0]
    )


def test_rows_that_are_off_or_empty_do_nothing(write_all, reads):
    write_all("sdxl")
    model, clip, _ = queueing.shared_models("sdxl")
    result = apply(
        model, clip, None, (NAMES[0], 1.0, 1.0, False), ("none", 1.0, 1.0), ("gone.safetensors", 1.0, 1.0, False)
    )
    assert result["model"] is model and result["clip"] is clip
    assert (result["lora_stack"], result["trigger_words"], result["report"]) == ([], "", "No LoRA is on.")
    assert reads == []


def test_entries_without_a_lora_are_passed_over_as_other_packs_do(write_all):
    write_all("sdxl")
    model, clip, _ = queueing.shared_models("sdxl")
    result = apply(model, clip, [("None", 1.0, 1.0), ["", 1, 1], [NAMES[0], 1, 1]])
    assert result["lora_stack"] == [(NAMES[0], 1.0, 1.0)]


@pytest.mark.parametrize("stack", [[("one.safetensors", 1.0)], ["one.safetensors"], [("one.safetensors", "a", 1.0)], 7])
def test_something_that_is_no_stack_is_refused(stack, folder):
    with pytest.raises(ValueError, match="lora_stack holds something else than .* connect a LORA_STACK output"):
        apply(queueing.shared_models("sdxl")[0], None, stack)


# Files that are missing, or for another model


def test_a_missing_file_is_named_before_anything_runs(folder):
    (folder / NAMES[0]).touch()
    check = LoraWorkbenchStackApply.validate_inputs
    assert check(lora_1=NAMES[0], lora_2="none") is True
    assert "'gone.safetensors' is not in the loras folder" in check(lora_1=NAMES[0], lora_3="gone.safetensors")
    assert check(lora_3="gone.safetensors", on_3=False) is True
    assert check(lora_1=None) is True
    assert "is not the name of a LoRA file" in check(lora_4="../models/secret.safetensors")


def test_comfyui_refuses_to_queue_a_missing_file(server):
    rows = {
        f"{name}_{n}": value for n in range(1, 5) for name, value in (("strength_model", 1.0), ("strength_clip", 1.0))
    }
    rows |= {f"lora_{number}": "none" for number in range(2, 5)} | {f"on_{number}": True for number in range(1, 5)}
    graph = {
        "base": {"class_type": "ToyWorldSDXL", "inputs": {}},
        "stack": {
            "class_type": "LoraWorkbenchStackApply",
            "inputs": {"model": ["base", 0], "lora_1": "gone.safetensors", **rows},
        },
        "shown": {"class_type": "PreviewAny", "inputs": {"source": ["stack", 4]}},
    }
    with pytest.raises(GraphRefused, match="The LoRA 'gone.safetensors' is not in the loras folder. Put the file back"):
        server.submit(graph)


def test_a_stack_with_a_missing_file_is_refused_before_any_file_is_read(write_all, reads):
    write_all("sdxl")
    with pytest.raises(ValueError, match="The LoRA 'gone.safetensors' is not in the loras folder"):
        apply(queueing.shared_models("sdxl")[0], None, [(NAMES[0], 1.0, 1.0), ("gone.safetensors", 1.0, 1.0)])
    assert reads == []


@pytest.mark.parametrize("name", ["../outside.safetensors", "..\\outside.safetensors", "/outside.safetensors"])
def test_a_stack_cannot_leave_the_loras_folder(name, folder):
    write(folder.parent, "outside.safetensors", "sdxl")
    with pytest.raises(ValueError, match="is not the name of a LoRA file"):
        apply(queueing.shared_models("sdxl")[0], None, [(name, 1.0, 1.0)])


@pytest.mark.parametrize(
    "made_for, given, said",
    [
        ("flux", "sdxl", "The LoRA 'one.safetensors' is for FLUX, but the model is SDXL: choose a LoRA for SDXL, or"),
        ("sdxl", "flux", "The LoRA 'one.safetensors' is for SDXL, but the model is FLUX: choose a LoRA for FLUX, or"),
    ],
)
@pytest.mark.parametrize("described", [True, False], ids=["by its metadata", "by its layers"])
def test_a_lora_of_another_family_is_refused(made_for, given, said, described, folder):
    write(folder, NAMES[0], made_for, metadata=None if described else {})
    if made_for == "sdxl" and not described:
        tensors = loras.read_lora(folder / NAMES[0])
        save_file({key.replace(*TEXT_ENCODERS): tensor.clone() for key, tensor in tensors.items()}, folder / NAMES[0])
    with pytest.raises(ValueError, match=said):
        apply(queueing.shared_models(given)[0], None, None, (NAMES[0], 1.0, 1.0))


def test_a_file_that_is_damaged_is_named(folder):
    (folder / NAMES[0]).write_bytes(b"not a LoRA at all")
    with pytest.raises(ValueError, match="The LoRA file 'one.safetensors' cannot be read"):
        apply(queueing.shared_models("sdxl")[0], None, None, (NAMES[0], 1.0, 1.0))


@pytest.mark.parametrize("part, size", [("lora_up.weight", None), ("alpha", (2,))])
def test_a_file_with_half_a_layer_is_named(part, size, folder):
    layer = "lora_unet_single_blocks_0_linear2"
    whole = {f"{layer}.lora_{side}.weight": torch.zeros(4, 4) for side in ("up", "down")}
    broken = whole | {f"{layer}.{part}": torch.zeros(size or 4)}
    if size is None:
        del broken[f"{layer}.lora_down.weight"]
    save_file(broken, folder / NAMES[0])
    with pytest.raises(ValueError, match="^The LoRA file 'one.safetensors' is broken, so download or train it again"):
        apply(queueing.shared_models("flux")[0], None, [(NAMES[0], 1.0, 1.0)])


# What it tells


def test_the_report_counts_layers_and_says_when_nothing_fits(folder):
    write(folder, NAMES[0], "sdxl")
    save_file({"lora_unet_nowhere.lora_down.weight": torch.zeros(1, 1)}, folder / NAMES[3])
    model, clip, _ = queueing.shared_models("sdxl")
    report = apply(model, clip, None, (NAMES[0], 0.75, 0.5), (NAMES[3], 1.0, 1.0), xray="off")
    report = report["report"].splitlines()
    layers = sum(key.endswith(".alpha") for key in loras.read_lora(folder / NAMES[0]))
    assert report == [
        f"one.safetensors: model 0.75, clip 0.5, {layers} layers",
        "four.safetensors: model 1, clip 1, NO layer of this model fits it",
    ]


@pytest.mark.parametrize(
    "metadata, words",
    [
        ({"modelspec.trigger_phrase": "zork"}, "zork"),
        ({"ss_tag_frequency": json.dumps({"10_zork": {"zork": 12, "star": 3}})}, "zork"),
        ({"ss_tag_frequency": "{broken"}, ""),
        ({"ss_tag_frequency": json.dumps({"10_zork": {"zork": None, "star": 3}})}, ""),
        ({"ss_tag_frequency": "[]"}, ""),
        ({}, ""),
    ],
)
def test_trigger_words_come_from_the_file(metadata, words, folder):
    write(folder, NAMES[0], "sdxl", metadata=metadata)
    assert apply(queueing.shared_models("sdxl")[0], None, None, (NAMES[0], 1.0, 1.0))["trigger_words"] == words


def test_each_trigger_word_is_named_once(folder):
    for name, word in zip(NAMES[:3], ("zork", "blip", "zork"), strict=True):
        write(folder, name, "sdxl", metadata={"modelspec.trigger_phrase": word})
    rows = [(name, 1.0, 1.0) for name in NAMES[:3]]
    assert apply(queueing.shared_models("sdxl")[0], None, rows)["trigger_words"] == "zork, blip"


@pytest.mark.parametrize("said", ["sd_v1", "flux1"])
def test_a_file_that_names_the_wrong_family_is_put_on_where_its_layers_fit(said, folder):
    write(folder, "mistaken.safetensors", "sdxl", metadata={"ss_base_model_version": said}, every=4)
    model, clip, _ = queueing.shared_models("sdxl")
    ours = apply(model, clip, None, ("mistaken.safetensors", 0.7, 0.7))
    theirs = chained(model, clip, [("mistaken.safetensors", 0.7, 0.7)])
    assert weights(ours["model"]) == weights(theirs[0]) != weights(model)
