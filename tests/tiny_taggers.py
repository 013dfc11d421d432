"""Tiny random WD taggers, made on the spot. What they say is noise, but it depends on the picture."""

import json
from pathlib import Path

SIZE = 32
ROWS = (
    ("9999999", "general", "9", "1"),
    ("1", "1girl", "0", "5"),
    ("2", "long_hair", "0", "4"),
    ("3", "^_^", "0", "3"),
    ("4", "saber_(fate)", "4", "2"),
    ("5", "watermark", "0", "1"),
)
NAMES = [name for _, name, *_ in ROWS]


def write_tags(path: Path, rows=ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["tag_id,name,category,count", *map(",".join, rows)]) + "\n", encoding="utf-8")
    return path


def write_timm(folder: Path) -> Path:
    """A tagger folder for timm."""
    import timm
    import torch
    from safetensors.torch import save_file

    arguments = {
        "img_size": SIZE,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "class_token": False,
        "global_pool": "avg",
        "fc_norm": False,
    }
    with torch.random.fork_rng():
        torch.manual_seed(5)
        network = timm.create_model("vit_base_patch16_224", num_classes=len(ROWS), **arguments)
        torch.nn.init.normal_(network.head.weight, std=2.0)
    write_tags(folder / "selected_tags.csv")
    save_file(network.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "vit_base_patch16_224",
        "num_classes": len(ROWS),
        "model_args": arguments,
        "pretrained_cfg": {"input_size": [3, SIZE, SIZE], "num_classes": len(ROWS)},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_onnx(path: Path, batch: int | str = "batch", weights=None) -> Path:
    """A tagger as one ``.onnx`` file: the mean colour of a picture (BGR, 0 to 255) times ``weights`` (3, tags)."""
    import numpy as np
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    if weights is None:
        weights = np.random.default_rng(5).normal(size=(3, len(ROWS)), scale=0.02)
    weights = np.asarray(weights, dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("ReduceMean", ["pictures"], ["colour"], axes=[1, 2], keepdims=0),
            helper.make_node("MatMul", ["colour", "weights"], ["logits"]),
            helper.make_node("Sigmoid", ["logits"], ["tags"]),
        ],
        "tagger",
        [helper.make_tensor_value_info("pictures", TensorProto.FLOAT, [batch, SIZE, SIZE, 3])],
        [helper.make_tensor_value_info("tags", TensorProto.FLOAT, [batch, weights.shape[1]])],
        [numpy_helper.from_array(weights, "weights")],
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), str(path))
    return path


def write_onnx_folder(folder: Path, **settings) -> Path:
    """A tagger folder for onnxruntime."""
    write_onnx(folder / "model.onnx", **settings)
    write_tags(folder / "selected_tags.csv")
    return folder
