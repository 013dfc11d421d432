"""Florence-2 in its first layout (microsoft's, PromptGen, CogFlorence), loaded into the class of transformers.

Such a folder brings its own program code, which is never run. The names in its weights are translated here, the rest
of its facts are those of that layout: https://huggingface.co/microsoft/Florence-2-base.
"""

import re
from pathlib import Path

import torch

from .local_model import has_safetensors, named, prepared, read_config

TOKENS = (
    *("<od>", "</od>", "<ocr>", "</ocr>"),
    *(f"<loc_{place}>" for place in range(1000)),
    *("<cap>", "</cap>", "<ncap>", "</ncap>", "<dcap>", "</dcap>", "<grounding>", "</grounding>", "<seg>", "</seg>"),
    *("<sep>", "<region_cap>", "</region_cap>", "<region_to_desciption>", "</region_to_desciption>"),
    *("<proposal>", "</proposal>", "<poly>", "</poly>", "<and>"),
)
"""What the folder's code adds to the words of BART, in the order of its weights; misspelt as there."""
IMAGE_TOKEN = "<image>"

RENAMES = (
    (r"^vision_tower\.convs\.(\d+)\.proj\.", r"vision_tower.convs.\1.conv."),
    (r"\.(conv[12])\.fn\.dw\.", r".\1."),
    (r"\.(window|channel)_attn\.norm\.", r".norm1."),
    (r"\.ffn\.norm\.", r".norm2."),
    (r"\.(window_attn|channel_attn)\.fn\.", r".\1."),
    (r"\.ffn\.fn\.net\.", r".ffn."),
    (r"^language_model\.(model\.)?(?=lm_head)", r""),
    (r"^language_model\.model\.", r"language_model."),
    (r"^image_projection$", r"multi_modal_projector.image_projection.weight"),
    (r"^image_proj_norm\.", r"multi_modal_projector.image_proj_norm."),
    (r"^image_pos_embed\.", r"multi_modal_projector.image_position_embed."),
    (r"^visual_temporal_embed\.", r"multi_modal_projector.visual_temporal_embed."),
)
HEAD = "lm_head.weight"
WORDS = (
    "model.language_model.shared.weight",
    "model.language_model.encoder.embed_tokens.weight",
    "model.language_model.decoder.embed_tokens.weight",
    HEAD,
)
"""One tensor under four names, of which a file may hold any."""
UNUSED = "language_model.final_logits_bias"  # zeros


def is_legacy(config: dict) -> bool:
    """Whether this ``config.json`` of a Florence-2 is in the first layout."""
    return "dim_embed" in config.get("vision_config", {})


def open_processor(folder: Path):
    """The processor of such a folder; the tokenizer gains ``<image>`` behind the words that the weights know."""
    with named(folder):
        from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, Florence2Processor

        local = {"local_files_only": True, "trust_remote_code": False}
        # Its own config.json names a kind of text model that only its code knows.
        tokenizer = AutoTokenizer.from_pretrained(folder, config=AutoConfig.for_model("bart"), **local)
        known = tokenizer.get_vocab()
        tokenizer.add_tokens([token for token in (*TOKENS, IMAGE_TOKEN) if token not in known], special_tokens=True)
        tokenizer.image_token, tokenizer.image_token_id = IMAGE_TOKEN, tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        images = AutoImageProcessor.from_pretrained(folder, **local)
        images.image_seq_length = getattr(images, "image_seq_length", 577)
        return Florence2Processor(images, tokenizer)


def open_network(folder: Path, dtype: torch.dtype, processor) -> torch.nn.Module:
    """The network of such a folder, as transformers' own class; ValueError when weights are missing."""
    with named(folder):
        from transformers import AutoModelForImageTextToText

        config = translated_config(folder)
        config.image_token_id = processor.image_token_id
        network = AutoModelForImageTextToText.from_config(config, dtype=dtype)
        network.load_state_dict(translated_weights(read_weights(folder)))
        known = config.text_config.vocab_size
        network.resize_token_embeddings(max(len(processor.tokenizer), known), mean_resizing=False)
        with torch.no_grad():  # <image> only holds a place
            network.get_input_embeddings().weight[known:] = 0
    return prepared(network)


def translated_config(folder: Path):
    """The configuration of such a folder, in the terms of transformers' own class."""
    from transformers import AutoConfig

    legacy = read_config(folder)
    vision = legacy["vision_config"]
    kept = ("depths", "patch_size", "patch_stride", "patch_padding", "patch_prenorm", "num_heads", "num_groups")
    kept += ("window_size", "drop_path_rate", "projection_dim")
    text = {name: value for name, value in legacy["text_config"].items() if name != "auto_map"}
    return AutoConfig.for_model(
        "florence2",
        text_config={**text, "model_type": "bart"},
        vision_config={
            **{name: vision[name] for name in kept if name in vision},
            "embed_dim": vision["dim_embed"],
            "max_temporal_embeddings": vision["visual_temporal_embedding"]["max_temporal_embeddings"],
            "max_position_embeddings": vision["image_pos_embed"]["max_pos_embeddings"],
        },
    )


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the folder's weight files; those in Torch's own format are read as weights only."""
    weights: dict[str, torch.Tensor] = {}
    if has_safetensors(folder):
        from safetensors.torch import load_file

        for path in sorted(folder.glob("*.safetensors")):
            weights |= load_file(path)
    else:
        for path in sorted(folder.glob("*.bin")):
            weights |= torch.load(path, map_location="cpu", weights_only=True)
    return weights


def translated_weights(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights under the names of transformers' own class."""
    translated = {_renamed(name): tensor for name, tensor in weights.items() if name != UNUSED}
    projection = "model.multi_modal_projector.image_projection.weight"
    if projection in translated:  # a matrix then, a linear layer now
        translated[projection] = translated[projection].T.contiguous()
    words = next((translated[name] for name in WORDS if name in translated), None)
    return translated if words is None else {**translated, **dict.fromkeys(WORDS, words)}


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name if name == HEAD else f"model.{name}"
