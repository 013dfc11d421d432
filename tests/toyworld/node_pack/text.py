"""Tiny text encoders whose weights are computed, not trained: token identity plus what the neighbouring words were.

A random transformer smears words. These weights are built so that the vector at "circle" in "a red circle" is the
vector of "circle" plus a rotated copy of "red": one attention head looks exactly one word back, the other averages.
NumPy's generator is used because its numbers are the same on every machine.
"""

import math

import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models_base
import comfy.text_encoders.flux
import folder_paths
import numpy
import torch

WIDTH = 64
POSITION = 16
CLIP_CONFIG = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "projection_dim": WIDTH,
}
T5_CONFIG = {
    "d_model": WIDTH,
    "d_ff": 2 * WIDTH,
    "d_kv": WIDTH,
    "num_heads": 2,
    "num_layers": 2,
    "num_decoder_layers": 2,
}
T5_TOKENS = 32
PERIODS = numpy.geomspace(3.0, 120.0, POSITION // 2)
ONE_BACK, TWO_BACK = 1, 2


def sdxl_clip(seed: int) -> comfy.sd.CLIP:
    """CLIP-L and CLIP-G, each 64 wide: context (77, 128), pooled (64,)."""
    target = comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, comfy.sdxl_clip.SDXLClipModel)
    options = {"dtype": torch.float32, "clip_l_model_config": CLIP_CONFIG, "clip_g_model_config": CLIP_CONFIG}
    clip = comfy.sd.CLIP(target, embedding_directory=folder_paths.get_folder_paths("embeddings"), model_options=options)
    _write_clip(clip.cond_stage_model.clip_l.transformer, seed)
    _write_clip(clip.cond_stage_model.clip_g.transformer, seed + 1)
    return clip


def flux_clip(seed: int) -> comfy.sd.CLIP:
    """T5 and CLIP-L, each 64 wide: context (32, 64), pooled (64,). Text is padded to 32 T5 tokens, not 256."""
    target = comfy.supported_models_base.ClipTarget(
        comfy.text_encoders.flux.FluxTokenizer, comfy.text_encoders.flux.flux_clip()
    )
    options = {"dtype": torch.float32, "clip_l_model_config": CLIP_CONFIG, "t5xxl_model_config": T5_CONFIG}
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data={"t5xxl_min_length": T5_TOKENS},
        model_options=options,
    )
    _write_clip(clip.cond_stage_model.clip_l.transformer, seed)
    _write_t5(clip.cond_stage_model.t5xxl.transformer, seed + 1)
    return clip


def _write_clip(model: torch.nn.Module, seed: int) -> None:
    random = numpy.random.default_rng(seed)
    _fill(model, random)
    embeddings = model.text_model.embeddings
    content = WIDTH - POSITION
    tokens = random.standard_normal((embeddings.token_embedding.weight.shape[0], WIDTH), dtype=numpy.float32)
    tokens[:, content:] = 0
    _put(embeddings.token_embedding.weight, tokens)
    angles = numpy.arange(embeddings.position_embedding.weight.shape[0])[:, None] * 2 * math.pi / PERIODS
    places = numpy.zeros((len(angles), WIDTH))
    places[:, content::2], places[:, content + 1 :: 2] = numpy.cos(angles), numpy.sin(angles)
    _put(embeddings.position_embedding.weight, places)
    for layer in model.text_model.encoder.layers:
        _look_one_back(layer.self_attn, random)
    _put(model.text_projection.weight, _rotation(random, WIDTH))


def _look_one_back(attention: torch.nn.Module, random: numpy.random.Generator) -> None:
    """Head 0 asks for the position before its own, head 1 for nothing; positions themselves are never written to."""
    content = WIDTH - POSITION
    ask, key = numpy.zeros((WIDTH, WIDTH)), numpy.zeros((WIDTH, WIDTH))
    for i, step in enumerate(2 * math.pi / PERIODS):
        turn = numpy.array([[math.cos(step), math.sin(step)], [-math.sin(step), math.cos(step)]])
        at = slice(2 * i, 2 * i + 2), slice(content + 2 * i, content + 2 * i + 2)
        ask[at], key[at] = 30.0 * turn, numpy.eye(2)
    _put(attention.q_proj.weight, ask)
    _put(attention.k_proj.weight, key)
    value, out = _rotation(random, WIDTH), _rotation(random, WIDTH)
    value[:, content:], out[content:, :] = 0, 0
    _put(attention.v_proj.weight, value)
    _put(attention.out_proj.weight, out)


def _write_t5(model: torch.nn.Module, seed: int) -> None:
    random = numpy.random.default_rng(seed)
    _fill(model, random)
    _put(model.shared.weight, random.standard_normal(model.shared.weight.shape, dtype=numpy.float32))
    bias = numpy.zeros(model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.shape)
    bias[ONE_BACK, 0] = bias[TWO_BACK, 1] = 12.0
    _put(model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight, bias)
    for block in model.encoder.block:
        attention = block.layer[0].SelfAttention
        _put(attention.v.weight, numpy.concatenate([_rotation(random, WIDTH), 0.5 * _rotation(random, WIDTH)]))
        _put(attention.o.weight, numpy.concatenate([_rotation(random, WIDTH), _rotation(random, WIDTH)], axis=1))


def _fill(model: torch.nn.Module, random: numpy.random.Generator) -> None:
    """Ones for norms, zeros for biases, small noise for matrices."""
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            _put(weight, numpy.full(weight.shape, 1.0 if name.endswith("weight") else 0.0))
        elif weight.shape[0] < 1000:
            _put(weight, 0.02 * random.standard_normal(weight.shape, dtype=numpy.float32))


def _rotation(random: numpy.random.Generator, size: int) -> numpy.ndarray:
    return numpy.linalg.qr(random.standard_normal((size, size)))[0]


def _put(weight: torch.Tensor, values: numpy.ndarray) -> None:
    with torch.no_grad():
        weight.copy_(torch.from_numpy(numpy.ascontiguousarray(values, dtype=numpy.float32)))
