"""Tiny random vision-language models, written to a folder as transformers would download them.

What they say is noise; but it depends on the picture, on the instruction and, where padding is wrong, on the batch.
"""

import re
import shutil
from pathlib import Path

import torch

WORDS = ["a red circle on a blue background, describe this picture in one short paragraph. what is it? " * 4]
CHAT = (
    "{% for message in messages %}{{ '<|user|>' }}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '" + "PLACE" + "' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|answer|>' }}{% endif %}"
)
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
PICTURE = 32


def tokenizer(special: list[str], chat: str | None = None, **settings):
    """Bytes and a few merges; the special tokens come first, in order."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=special,
        show_progress=False,
    )
    words.train_from_iterator(WORDS, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=words, **settings)
    made.chat_template = chat
    return made


def save(folder: Path, network, *others) -> Path:
    """Random weights large enough that the answer follows what is asked and shown."""
    random = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.25)
    network.tie_weights()
    network.generation_config.eos_token_id = None  # noise would end anywhere
    network.save_pretrained(folder)
    for other in others:
        other.save_pretrained(folder)
    return folder


def write_qwen3_vl(folder: Path) -> Path:
    import transformers as t

    special = ["<|pad|>", "<|end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|user|>", "<|answer|>"]
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    words = tokenizer(special, CHAT.replace("PLACE", place), pad_token="<|pad|>", eos_token="<|end|>")
    identity = {token: words.convert_tokens_to_ids(token) for token in special}
    config = t.Qwen3VLConfig(
        text_config={
            **_text(len(words)),
            "num_hidden_layers": 3,
            "head_dim": 16,
            "rope_parameters": {**ROPE, "mrope_interleaved": True},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "patch_size": 16,
            "out_hidden_size": 32,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1],
        },
        image_token_id=identity["<|image_pad|>"],
        video_token_id=identity["<|video_pad|>"],
        vision_start_token_id=identity["<|vision_start|>"],
        vision_end_token_id=identity["<|vision_end|>"],
    )
    return save(folder, t.Qwen3VLForConditionalGeneration(config), _qwen_processor("Qwen3VLProcessor", words, 16))


def write_qwen25_vl(folder: Path) -> Path:
    import transformers as t

    special = ["<|pad|>", "<|end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|user|>", "<|answer|>"]
    place = "<|vision_start|><|image_pad|><|vision_end|>"
    words = tokenizer(special, CHAT.replace("PLACE", place), pad_token="<|pad|>", eos_token="<|end|>")
    identity = {token: words.convert_tokens_to_ids(token) for token in special}
    config = t.Qwen2_5_VLConfig(
        text_config={**_text(len(words)), "rope_parameters": ROPE},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 32,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        image_token_id=identity["<|image_pad|>"],
        video_token_id=identity["<|video_pad|>"],
        vision_start_token_id=identity["<|vision_start|>"],
        vision_end_token_id=identity["<|vision_end|>"],
    )
    return save(folder, t.Qwen2_5_VLForConditionalGeneration(config), _qwen_processor("Qwen2_5_VLProcessor", words, 14))


def _text(vocabulary: int) -> dict:
    return {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def _qwen_processor(kind: str, words, patch: int):
    import transformers as t

    side = patch * 2
    images = t.Qwen2VLImageProcessor(min_pixels=side * side, max_pixels=side * side * 16, patch_size=patch)
    videos = t.Qwen2VLVideoProcessor() if kind == "Qwen2_5_VLProcessor" else t.Qwen3VLVideoProcessor()
    return getattr(t, kind)(images, words, videos, chat_template=words.chat_template)


def write_llava(folder: Path, chat: str | None = None) -> Path:
    """A LLaVA of SigLIP and Llama, which is what JoyCaption is."""
    import transformers as t

    special = ["<|pad|>", "<|end|>", "<|begin|>", "<image>", "<|user|>", "<|answer|>"]
    words = tokenizer(
        special,
        chat or CHAT.replace("PLACE", "<image>"),
        pad_token="<|pad|>",
        eos_token="<|end|>",
        bos_token="<|begin|>",
        extra_special_tokens={"image_token": "<image>"},
    )
    vision = t.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=PICTURE,
        patch_size=16,
    )
    config = t.LlavaConfig(
        vision_config=vision,
        text_config=t.LlamaConfig(**{**_text(len(words)), "bos_token_id": 2}),
        image_token_index=words.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-2,
        image_seq_length=4,
    )
    processor = t.LlavaProcessor(
        t.SiglipImageProcessor(size={"height": PICTURE, "width": PICTURE}),
        words,
        patch_size=16,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=words.chat_template,
    )
    return save(folder, t.LlavaForConditionalGeneration(config), processor)


def write_gemma3(folder: Path) -> Path:
    import transformers as t

    special = ["<pad>", "<eos>", "<bos>", "<image_soft_token>", "<start_of_image>", "<end_of_image>"]
    special += ["<|user|>", "<|answer|>"]
    words = tokenizer(
        special,
        "{{ '<bos>' }}" + CHAT.replace("PLACE", "<start_of_image>"),
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        extra_special_tokens={
            "image_token": "<image_soft_token>",
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
        },
    )
    config = t.Gemma3Config(
        text_config={
            **_text(len(words)),
            "head_dim": 16,
            "bos_token_id": 2,
            "sliding_window": 512,
            "tie_word_embeddings": False,
        },
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": PICTURE,
            "patch_size": 8,
        },
        tie_word_embeddings=False,
        mm_tokens_per_image=4,
        boi_token_index=words.convert_tokens_to_ids("<start_of_image>"),
        eoi_token_index=words.convert_tokens_to_ids("<end_of_image>"),
        image_token_index=words.convert_tokens_to_ids("<image_soft_token>"),
    )
    images = t.Gemma3ImageProcessor(size={"height": PICTURE, "width": PICTURE})
    processor = t.Gemma3Processor(images, words, chat_template=words.chat_template, image_seq_length=4)
    return save(folder, t.Gemma3ForConditionalGeneration(config), processor)


def write_florence(folder: Path) -> Path:
    import transformers as t

    words = tokenizer(
        ["<s>", "<pad>", "</s>", "<unk>", "<image>"],
        bos_token="<s>",
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = florence_images()
    config = t.Florence2Config(
        text_config=florence_text(len(words)),
        vision_config=florence_vision(),
        image_token_id=words.convert_tokens_to_ids("<image>"),
    )
    network = t.Florence2ForConditionalGeneration(config)
    return save(folder, network, t.Florence2Processor(images, words))


def florence_images():
    import transformers as t

    size = {"height": 64, "width": 64}
    images = t.CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    images.image_seq_length = (64 // 32) ** 2 + 1
    return images


def florence_text(vocabulary: int) -> dict:
    return {
        "model_type": "bart",
        "vocab_size": vocabulary,
        "d_model": 32,
        "max_position_embeddings": 512,
        "encoder_layers": 1,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 64,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 64,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    }


def florence_vision() -> dict:
    return {
        "depths": [1, 1, 1, 1],
        "embed_dim": [16, 32, 32, 32],
        "num_heads": [2] * 4,
        "num_groups": [2] * 4,
        "window_size": 4,
        "projection_dim": 32,
        "drop_path_rate": 0.0,
    }


def write_blip(folder: Path) -> Path:
    import transformers as t

    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "[ENC]"]
    vocabulary = {word: place for place, word in enumerate([*marks, *"abcdefghijklmnopqrstuvwxyz", "circle", "square"])}
    words = t.BertTokenizerFast(vocab=vocabulary)
    images = t.BlipImageProcessor(size={"height": PICTURE, "width": PICTURE})
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = t.BlipConfig(
        text_config={
            **size,
            "num_hidden_layers": 1,
            "vocab_size": len(vocabulary),
            "encoder_hidden_size": 32,
            "projection_dim": 32,
            "bos_token_id": 5,
            "eos_token_id": 3,
            "sep_token_id": 3,
            "pad_token_id": 0,
        },
        vision_config={**size, "num_hidden_layers": 2, "image_size": PICTURE, "patch_size": 16, "projection_dim": 32},
        image_text_hidden_size=32,
        projection_dim=32,
    )
    return save(folder, t.BlipForConditionalGeneration(config), t.BlipProcessor(images, words))


def write_blip2(folder: Path) -> Path:
    import transformers as t

    words = tokenizer(["<pad>", "</s>", "<s>"], pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    images = t.BlipImageProcessor(size={"height": PICTURE, "width": PICTURE})
    processor = t.Blip2Processor(images, words, num_query_tokens=4)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
    config = t.Blip2Config(
        vision_config={**size, "image_size": PICTURE, "patch_size": 16},
        qformer_config={**size, "encoder_hidden_size": 32, "cross_attention_frequency": 2, "vocab_size": 32},
        text_config=t.OPTConfig(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=32,
            vocab_size=len(processor.tokenizer),
            max_position_embeddings=512,
            bos_token_id=2,
            pad_token_id=0,
            eos_token_id=1,
        ),
        num_query_tokens=4,
        image_token_index=processor.tokenizer.convert_tokens_to_ids("<image>"),
    )
    return save(folder, t.Blip2ForConditionalGeneration(config), processor)


def write_legacy_florence(folder: Path, weights: str = "safetensors"):
    """A Florence-2 in microsoft's layout; gives the same network in the class of transformers, to compare with."""
    import json

    import transformers as t
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    words = tokenizer(special, bos_token="<s>", pad_token="<pad>", eos_token="</s>")
    words.backend_tokenizer.save(str(folder / "tokenizer.json"))
    words.backend_tokenizer.model.save(str(folder))
    (folder / "tokenizer_config.json").write_text('{"model_max_length": 1024}')
    known = len(words) + 1024  # what its own code adds
    text, vision = florence_text(known), florence_vision()
    network = t.Florence2ForConditionalGeneration(
        t.Florence2Config(text_config=text, vision_config=vision, image_token_id=known)
    )
    save(folder / "discarded", network)
    shutil.rmtree(folder / "discarded")
    config = {
        "model_type": "florence2",
        "architectures": ["Florence2ForConditionalGeneration"],
        "auto_map": {"AutoModelForCausalLM": "modeling_florence2.Florence2ForConditionalGeneration"},
        "text_config": {**text, "model_type": "florence2_language"},
        "vision_config": {
            **{name: value for name, value in vision.items() if name != "embed_dim"},
            "model_type": "davit",
            "dim_embed": vision["embed_dim"],
            "patch_size": [7, 3, 3, 3],
            "patch_stride": [4, 2, 2, 2],
            "patch_padding": [3, 1, 1, 1],
            "patch_prenorm": [False, True, True, True],
            "enable_checkpoint": False,
            "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": 100},
            "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": 50},
            "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    images = {**florence_images().to_dict(), "auto_map": {"AutoProcessor": "processing_florence2.Florence2Processor"}}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({**images, "image_processor_type": "CLIPImageProcessor"})
    )
    for module in ("modeling_florence2", "processing_florence2", "configuration_florence2"):
        (folder / f"{module}.py").write_text("raise SystemExit('code of a model folder was run')")
    state = {legacy_name(name): value.clone() for name, value in network.state_dict().items()}
    state["image_projection"] = state["image_projection"].T.contiguous()
    state["language_model.final_logits_bias"] = torch.zeros(1, known)
    if weights == "safetensors":  # where tensors that are the same are kept under one name
        for name in ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"):
            del state[f"language_model.{name}"]
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    else:
        torch.save(state, folder / "pytorch_model.bin")
    return network


LEGACY_BLOCK = {
    "conv1": "conv1.fn.dw",
    "conv2": "conv2.fn.dw",
    "norm2": "ffn.norm",
    "ffn.fc1": "ffn.fn.net.fc1",
    "ffn.fc2": "ffn.fn.net.fc2",
    **{f"{kind}_attn.{part}": f"{kind}_attn.fn.{part}" for kind in ("window", "channel") for part in ("qkv", "proj")},
}
"""In a block of the vision tower: the part in transformers -> the part in microsoft's layout."""
LEGACY_REST = {
    "lm_head.weight": "language_model.lm_head.weight",
    "model.multi_modal_projector.image_projection.weight": "image_projection",
    "model.multi_modal_projector.image_proj_norm.weight": "image_proj_norm.weight",
    "model.multi_modal_projector.image_proj_norm.bias": "image_proj_norm.bias",
    "model.multi_modal_projector.image_position_embed.row_embeddings.weight": "image_pos_embed.row_embeddings.weight",
    "model.multi_modal_projector.image_position_embed.column_embeddings.weight": (
        "image_pos_embed.column_embeddings.weight"
    ),
    "model.multi_modal_projector.visual_temporal_embed.pos_idx_to_embed": "visual_temporal_embed.pos_idx_to_embed",
}


def legacy_name(name: str) -> str:
    """A weight's name in microsoft's layout, written out part by part, from its name in transformers."""
    if name in LEGACY_REST:
        return LEGACY_REST[name]
    if name.startswith("model.language_model."):
        return "language_model.model." + name.removeprefix("model.language_model.")
    name = name.removeprefix("model.")
    if ".convs." in name:
        return name.replace(".conv.", ".proj.")
    *front, block, rest = re.split(r"(spatial_block|channel_block)\.", name)
    part, _, end = rest.rpartition(".")
    attention = "window_attn" if block == "spatial_block" else "channel_attn"
    return f"{''.join(front)}{block}.{ {**LEGACY_BLOCK, 'norm1': f'{attention}.norm'}[part] }.{end}"
