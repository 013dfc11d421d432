"""What a LoRA file calls a layer, in the three forms there are, and which layer of the model that is.

    kohya       lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_up.weight
    comfyui     diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.lora_up.weight
    diffusers   unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight

diffusers' form is written as both diffusers and ComfyUI read it: for U-Nets and text encoders with the ends that came
before peft's, since ComfyUI finds the attention of a U-Net by these alone; for FLUX with peft's own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from . import flux_names
from .layers import DOWN, UP
from .unet_names import UNet, unet_of

KOHYA, DIFFUSERS, COMFYUI = "kohya", "diffusers", "comfyui"
MODEL, CLIP_L, CLIP_G, T5 = "model", "clip_l", "clip_g", "t5xxl"

PREFIXES = (
    ("lora_unet_", KOHYA, MODEL),
    ("lora_transformer_", KOHYA, MODEL),
    ("lycoris_", KOHYA, MODEL),
    ("lora_te1_", KOHYA, CLIP_L),
    ("lora_te2_", KOHYA, CLIP_G),
    ("lora_te3_", KOHYA, T5),
    ("lora_te_", KOHYA, CLIP_L),
    ("diffusion_model.", COMFYUI, MODEL),
    ("text_encoders.clip_l.transformer.", COMFYUI, CLIP_L),
    ("text_encoders.clip_g.transformer.", COMFYUI, CLIP_G),
    ("text_encoders.t5xxl.transformer.", COMFYUI, T5),
    ("unet.base_model.model.", DIFFUSERS, MODEL),
    ("transformer.base_model.model.", DIFFUSERS, MODEL),
    ("base_model.model.", DIFFUSERS, MODEL),
    ("unet.", DIFFUSERS, MODEL),
    ("transformer.", DIFFUSERS, MODEL),
    ("text_encoder.", DIFFUSERS, CLIP_L),
    ("text_encoder_2.", DIFFUSERS, CLIP_G),
    ("text_encoder_3.", DIFFUSERS, T5),
)
BARE = r"(down_blocks|mid_block|up_blocks|transformer_blocks|single_transformer_blocks)\."
"""How diffusers' names begin that say no network."""
CLIP_LAYER = r"text_model\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
CLIP_EXTRA = r"text_projection|text_model\.embeddings\.(token|position)_embedding"
T5_LAYER = r"encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.w(i|i_0|i_1|o))|shared"

WORDS = """
    input_blocks middle_block output_blocks time_embed label_emb in_layers emb_layers out_layers skip_connection
    down_blocks mid_block up_blocks transformer_blocks proj_in proj_out to_q to_k to_v to_out conv_in conv_out
    time_embedding add_embedding time_emb_proj conv_shortcut linear_1 linear_2
    double_blocks single_blocks img_attn txt_attn img_mlp txt_mlp img_mod txt_mod img_in txt_in time_in vector_in
    guidance_in in_layer out_layer final_layer adaLN_modulation
    single_transformer_blocks to_add_out add_q_proj add_k_proj add_v_proj ff_context norm1_context proj_mlp x_embedder
    context_embedder time_text_embed timestep_embedder text_embedder guidance_embedder norm_out
    text_model self_attn q_proj k_proj v_proj out_proj text_projection token_embedding position_embedding wi_0 wi_1
"""
"""Words with an underscore of their own: in kohya's names every other underscore stands for a dot."""
LONGEST_FIRST = "|".join(sorted(WORDS.split(), key=len, reverse=True))
WORD = re.compile(rf"(?:^|(?<=_))({LONGEST_FIRST})(?=_|$)")


@dataclass(frozen=True)
class Address:
    """A layer of a model: its network, its path there as checkpoints have it, and which piece of a fused layer."""

    network: str
    path: str
    piece: int | None = None


@dataclass(frozen=True)
class Names:
    """The layers of one file: the address of each name, None where we know no such layer."""

    addresses: dict[str, Address | None]
    unet: UNet
    sd15: bool = False

    def called(self, address: Address, form: str) -> tuple[str, ...]:
        """What a layer is called in another form, in pieces where diffusers has several; () when it has no name."""
        if form == DIFFUSERS:
            return self._called_in_diffusers(address)
        if form == COMFYUI:
            return (_prefix(COMFYUI, address.network) + address.path,)
        return (self._prefix_in_kohya(address.network) + self._path_in_kohya(address).replace(".", "_"),)

    def _prefix_in_kohya(self, network: str) -> str:
        return "lora_te_" if self.sd15 and network == CLIP_L else _prefix(KOHYA, network)

    def _path_in_kohya(self, address: Address) -> str:
        """kohya trains SD 1.5 as diffusers has it, and all else as checkpoints have it."""
        return (self.sd15 and address.network == MODEL and self.unet.to_diffusers(address.path)) or address.path

    def _called_in_diffusers(self, address: Address) -> tuple[str, ...]:
        if address.network != MODEL:
            # ComfyUI finds no other layers of text encoders by diffusers' names.
            named = address.network != T5 and re.fullmatch(CLIP_LAYER, address.path)
            return (_prefix(DIFFUSERS, address.network) + address.path,) if named else ()
        if path := self.unet.to_diffusers(address.path):
            return ("unet." + path.replace(".to_", ".processor.to_").replace(".to_out.0", ".to_out"),)
        return tuple(f"transformer.{path}" for path in flux_names.to_diffusers(address.path))


def form_of(names: Iterable[str]) -> str | None:
    """The form that tensors' names are in; None when they are in none, or in several."""
    forms = {form for name in names if (form := _taken_apart(name)[0])}
    return forms.pop() if len(forms) == 1 else None


def names_of(layers: Iterable[str]) -> Names:
    """Which layers these names, without the ends of their tensors, stand for."""
    read = {name: _taken_apart(name) for name in layers}
    unet = unet_of(path for _, network, path in read.values() if network == MODEL)
    addresses = {name: _address(network, path, unet) for name, (_, network, path) in read.items()}
    return Names(addresses, unet, sd15=_is_sd15(addresses.values()))


def end_of(name: str, part: str) -> str:
    """What follows a layer's name for one of its tensors, `part` in kohya's words; all forms but diffusers' share it.

    `name` says the form and the network: peft's ends for FLUX, those before peft for the others.
    """
    if part not in (UP, DOWN):
        return f".{part}"
    side = "up" if part == UP else "down"
    if name.startswith("transformer."):
        return f".lora_{'B' if part == UP else 'A'}.weight"
    if name.startswith("unet."):
        return f"_lora.{side}.weight" if ".processor." in name else f".lora.{side}.weight"
    if name.startswith(("text_encoder.", "text_encoder_2.")):
        return f".lora_linear_layer.{side}.weight"
    return f".{part}"


def _prefix(form: str, network: str) -> str:
    return next(prefix for prefix, other, of in PREFIXES if (other, of) == (form, network))


def _taken_apart(name: str) -> tuple[str | None, str, str]:
    """The form of a name, its network and its path with dots; no form for what begins as none does."""
    for prefix, form, network in PREFIXES:
        if name.startswith(prefix):
            path = name.removeprefix(prefix)
            path = _dotted(path) if form == KOHYA else path
            return form, T5 if network == CLIP_G and path.startswith("encoder.block.") else network, _plain(path)
    return (DIFFUSERS if re.match(BARE, name) else None), MODEL, _plain(name)


def _dotted(path: str) -> str:
    return WORD.sub(lambda found: found[0].replace("_", "\0"), path).replace("_", ".").replace("\0", "_")


def _plain(path: str) -> str:
    """Without what older scripts put between: processors, an attention's own words in a text encoder."""
    path = re.sub(r"(?<=self_attn\.)to_(q|k|v|out)\b", r"\1_proj", path.replace(".processor.", "."))
    path = re.sub(r"^encoder\.layers\.", "text_model.encoder.layers.", path)
    return re.sub(r"(attn[12])\.to_out$", r"\1.to_out.0", path)


def _address(network: str, path: str, unet: UNet) -> Address | None:
    if network == T5:
        return Address(T5, path) if re.fullmatch(T5_LAYER, path) else None
    if network != MODEL:
        return Address(network, path) if re.fullmatch(f"{CLIP_LAYER}|{CLIP_EXTRA}", path) else None
    if unet.to_diffusers(path) or flux_names.to_diffusers(path):
        return Address(MODEL, path)
    if ours := unet.from_diffusers(path):
        return Address(MODEL, ours)
    if found := flux_names.from_diffusers(path):
        return Address(MODEL, *found)
    return None


def _is_sd15(addresses: Iterable[Address | None]) -> bool:
    """Whether this is SD 1.5 (or 2): of all U-Nets it alone has attention at full resolution."""
    first = r"input_blocks\.[12]\.1\.|output_blocks\.(9|10|11)\.1\."
    known = [address for address in addresses if address]
    return any(re.match(first, each.path) for each in known) and all(each.network != CLIP_G for each in known)
