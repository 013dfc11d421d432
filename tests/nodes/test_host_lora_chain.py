"""The stack asks ComfyUI's loader for a few names only, and gets all that it gives when it is asked for every one."""

import comfy.lora
import pytest
import queueing
import torch

from lora_workbench.nodes.host.lora_chain import beginnings
from lora_workbench.nodes.host.patches import key_map

pytestmark = pytest.mark.comfy
SPELLINGS = (
    (".lora_up.weight", ".lora_down.weight"),
    ("_lora.up.weight", "_lora.down.weight"),
    (".lora.up.weight", ".lora.down.weight"),
    (".lora_B.weight", ".lora_A.weight"),
    (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
    (".lora_B.default.weight", ".lora_A.default.weight"),
    (".lora_B", ".lora_A"),
    (".diff", ".diff_b"),
    (".w_norm", ".b_norm"),
    (".set_weight", ".alpha"),
    (".oft_blocks", ".rescale"),
)


@pytest.mark.parametrize("kind", ["sdxl", "flux"])
@pytest.mark.parametrize("ends", SPELLINGS, ids=lambda ends: ends[0])
def test_every_spelling_of_every_layer_is_found(kind, ends):
    """Compared with the loader itself, for names of all the forms that it knows for MODEL and CLIP."""
    model, clip, _ = queueing.shared_models(kind)
    keys = key_map(model, clip)
    names = list(keys)[::37]
    shape = {".alpha": (), ".oft_blocks": (1, 2, 2)}
    tensors = {f"{name}{end}": torch.ones(shape.get(end, (1, 1))) for name in names for end in ends}
    few = {name: target for name, target in keys.items() if name in beginnings(tensors)}
    found, every = (comfy.lora.load_lora(tensors, asked, log_missing=False) for asked in (few, keys))
    assert list(found) == list(every) and len(found) > 10
    assert set(names) <= few.keys() and len(few) < len(keys) / 10
