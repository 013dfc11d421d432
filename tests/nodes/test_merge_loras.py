"""The Merge LoRAs node: one file that does what all of them do, through ComfyUI's own loader."""

import loratoys
import pytest
import queueing
import torch
from safetensors.torch import load_file, save_file

import nodes
from lora_workbench.lora_files.forms import COMFYUI, DIFFUSERS, converted
from lora_workbench.nodes.merge_loras import LoraWorkbenchMergeLoras
from lora_workbench.training.description import read

pytestmark = pytest.mark.comfy
every_kind = pytest.mark.parametrize("kind", ["sdxl", "flux"])
NAMES = ("a.safetensors", "people/b.safetensors", "c.safetensors")
STRENGTHS = ((0.8, 0.3), (-0.6, 1.2), (0.5, 0.5))


def write(folder, kind, dtype=torch.float32):
    """Three LoRAs of other ranks and alphas, in three forms of names."""
    model, clip, _ = queueing.shared_models(kind)
    made = (
        loratoys.lora(model, clip, rank=4, alpha=2.0, seed=1),
        converted(without_t5(loratoys.lora(model, clip, rank=3, alpha=None, seed=2)), DIFFUSERS),
        converted(loratoys.lora(model, clip, rank=2, alpha=6.0, seed=3), COMFYUI),
    )
    words = ("zork", "blip", "zork")
    for name, tensors, word in zip(NAMES, made, words, strict=True):
        (folder / name).parent.mkdir(exist_ok=True)
        said = {"modelspec.trigger_phrase": word, "modelspec.architecture": f"{kind}/lora"}
        save_file({key: tensor.to(dtype).contiguous() for key, tensor in tensors.items()}, folder / name, said)


def without_t5(tensors):
    """diffusers has no names for LoRAs of T5."""
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("lora_te3")}


def merge(**changes):
    inputs = {
        "lora_1": "none",
        "weight_1": 1.0,
        "lora_2": "none",
        "weight_2": 1.0,
        "name": "people/all",
        "method": "concatenate",
        "rank": 0,
        "density": 0.5,
        "seed": 0,
        "precision": "as it is",
    }
    return queueing.run(LoraWorkbenchMergeLoras, **inputs | changes)


def chained(kind, rows):
    model, clip, _ = queueing.shared_models(kind)
    with torch.inference_mode():
        for row in rows:
            model, clip = nodes.LoraLoader().load_lora(model, clip, *row)
    return model, clip


STACK = [(name, *strengths) for name, strengths in zip(NAMES, STRENGTHS, strict=True)]


@every_kind
def test_the_merged_file_does_what_all_three_do_one_after_another(kind, folder):
    write(folder, kind)
    model, clip, _ = queueing.shared_models(kind)
    made = merge(lora_stack=STACK)
    assert made["lora_name"] == "people/all.safetensors" and made["lora_stack"] == [
        ("people/all.safetensors", 1.0, 1.0)
    ]
    ours, theirs = chained(kind, made["lora_stack"]), chained(kind, STACK)
    assert loratoys.apart(ours[0], theirs[0], model) < 1e-5
    assert loratoys.apart(ours[1].patcher, theirs[1].patcher, clip.patcher) < 1e-5
    assert "exactly what the LoRAs do together" in made["report"]


@every_kind
def test_an_svd_at_a_sufficient_rank_does_too_and_in_16_bits_to_their_precision(kind, folder):
    write(folder, kind)
    model = queueing.shared_models(kind)[0]
    for precision, error in (("fp32", 1e-5), ("fp16", 1e-3)):
        made = merge(lora_stack=STACK, method="svd", rank=64, precision=precision, name=precision)
        assert loratoys.apart(chained(kind, made["lora_stack"])[0], chained(kind, STACK)[0], model) < error
        assert "keeps 100 % of what was to be merged" in made["report"]


def test_a_lower_rank_keeps_the_share_that_the_report_says(folder):
    write(folder, "sdxl")
    model = queueing.shared_models("sdxl")[0]
    rows = [(name, 1.0, 0.0) for name in NAMES]
    made = merge(lora_stack=rows, method="svd", rank=4)
    said = float(made["report"].split("keeps ")[1].split(" %")[0]) / 100
    error = loratoys.apart(chained("sdxl", made["lora_stack"])[0], chained("sdxl", rows)[0], model)
    assert error == pytest.approx((1 - said**2) ** 0.5, abs=0.01) and 0.3 < said < 0.99


def test_widgets_and_stack_go_together_and_the_file_says_what_it_was_made_of(folder):
    write(folder, "sdxl", torch.float16)
    made = merge(lora_stack=STACK[:1], lora_1=NAMES[1], weight_1=0.5, lora_2="none", name="two")
    said = read(folder / "two.safetensors")
    assert said["modelspec.merged_from"] == "a.safetensors, b.safetensors"
    assert said["modelspec.trigger_phrase"] == "zork, blip" and said["modelspec.architecture"] == "sdxl/lora"
    assert said["lora_workbench.merged"] == "concatenate: a.safetensors 0.8 0.3; people/b.safetensors 0.5 0.5"
    stored = load_file(folder / "two.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if not name.endswith(".alpha")} == {torch.float16}
    assert made["report"].splitlines()[1:] == [
        "a.safetensors: model 0.8, clip 0.3",
        "people/b.safetensors: model 0.5, clip 0.5",
    ]


def test_queueing_again_writes_nothing_and_another_merge_of_that_name_overwrites_nothing(folder):
    write(folder, "sdxl")
    first = merge(lora_stack=STACK[:2])
    path = folder / first["lora_name"]
    before = path.stat().st_mtime_ns, path.read_bytes()
    assert merge(lora_stack=STACK[:2])["lora_name"] == first["lora_name"]
    other = merge(lora_stack=STACK[1:])
    assert other["lora_name"] == "people/all_v2.safetensors"
    assert (path.stat().st_mtime_ns, path.read_bytes()) == before


def test_what_cannot_be_merged_is_a_sentence(folder):
    write(folder, "sdxl")
    with pytest.raises(ValueError, match="There is nothing to merge: choose lora_1 and lora_2"):
        merge()
    with pytest.raises(ValueError, match="The LoRA 'gone.safetensors' is not in the loras folder"):
        merge(lora_1="gone.safetensors")
    with pytest.raises(ValueError, match="is not the name of a LoRA file"):
        merge(lora_stack=[("../outside.safetensors", 1.0, 1.0)])
    with pytest.raises(ValueError, match="cannot be the name of a LoRA file"):
        merge(lora_1=NAMES[0], name="../outside")
    flux = loratoys.lora(queueing.shared_models("flux")[0])
    save_file(flux, folder / "flux.safetensors")
    with pytest.raises(ValueError, match="'a.safetensors' is for SDXL, but 'flux.safetensors' is for FLUX"):
        merge(lora_1=NAMES[0], lora_2="flux.safetensors")
    broken = load_file(folder / NAMES[0])
    next(tensor for tensor in broken.values() if tensor.ndim)[0] = torch.nan
    save_file(broken, folder / "broken.safetensors")
    with pytest.raises(ValueError, match="'broken.safetensors' is broken: '.*' holds values that are not finite"):
        merge(lora_1=NAMES[0], lora_2="broken.safetensors")
    assert not (folder / "people/all.safetensors").exists()
