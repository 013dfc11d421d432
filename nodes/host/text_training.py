"""The text encoders of the wired CLIP in training: conditioning with gradients, and what is trained for it.

CLIP-L and CLIP-G compute anew what every caption says, with ComfyUI's own modules and the adapters attached. What the
other encoders (T5) say of it does not change and comes from the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import comfy.model_management as mm
import torch
from torch import Tensor, nn

from ...training.attach import Attachment
from ...training.batches import Batch
from ...training.config import TextConfig
from ...training.families import ATTENTION, LAYER_PRESETS
from ...training.lora import Adapter, Adapters, Part
from .new_tokens import NewTokens
from .text_encoders import CLIP_ENCODERS, encoders_of, entries_of, literal_tokens
from .weights import CastWeights

_ATTENTION = r"\.self_attn\.(q|k|v|out)_proj$"
_ATTENTION_AND_FEED_FORWARD = r"\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])$"
LAYERS = {name: _ATTENTION if name == ATTENTION else _ATTENTION_AND_FEED_FORWARD for name in LAYER_PRESETS}
"""A text encoder has no other layers than these in its blocks."""
SAME_INPUT = ((".self_attn.q_proj", ".self_attn.k_proj", ".self_attn.v_proj"),)
BLOCKS = ("CLIPLayer",)
OPTIONS = ("layer", "layer_idx", "return_projected_pooled", "execution_device")
"""What ComfyUI sets on an encoder before it encodes."""
T5 = "t5xxl"


class TrainedText:
    """The text side of a training, over a CLIP in place; it is left as it was after every `adapted()` block."""

    def __init__(self, clip, config: TextConfig, words: Mapping[str, str], seed: int) -> None:
        """`words` says of each trigger word what it is (training/embeddings.py); only new tokens ask for it.

        ValueError when the CLIP has no encoder that can be trained.
        """
        # A clone shares the weights; it keeps what is patched onto this CLIP apart from what other nodes patch.
        self._clip, self._config = clip.clone(), config
        self.tokens = NewTokens(self._clip, words, config.new_tokens, seed) if config.new_tokens else None
        self._encoders = {name: encoder for name, encoder in encoders_of(clip).items() if name in CLIP_ENCODERS}
        if not self._encoders:
            found = ", ".join(encoders_of(clip)) or type(clip.cond_stage_model).__name__
            raise ValueError(
                f"The CLIP has the text encoder {found}, and only CLIP-L and CLIP-G are trained: "
                "set text_encoder_rate to 0."
            )
        self._attachments: list[Attachment] = []
        self._adapters: dict[str, Mapping[str, Tensor]] = {}

    @property
    def patcher(self):
        """The CLIP's weights, and what is patched onto them."""
        return self._clip.patcher

    @property
    def loaded(self) -> list:
        """What ComfyUI loads for a step: the CLIP.

        Nothing when it holds T5, twenty times as large as what is trained, and nothing is patched onto it: then the
        weights are read from wherever they are.
        """
        return [] if T5 in encoders_of(self._clip) and not self.patcher.patches else [self.patcher]

    def parts(self) -> list[Part]:
        """The encoders as networks to adapt; none when their learning rate is 0."""
        if not self._config.encoder_rate:
            return []
        rate, until = self._config.encoder_rate, self._config.encoder_stop
        return [
            Part(self._prefix(name), _blocks(encoder), LAYERS, rate=rate, until=until)
            for name, encoder in self._encoders.items()
        ]

    def extra(self) -> list[Adapter]:
        """The new words; none unless they are trained."""
        return [] if self.tokens is None else self.tokens.adapters(self._config.token_rate)

    @property
    def _fitting(self) -> list:
        """What may be patched onto the weights when they are read."""
        return [self.patcher.patches_uuid] if self.loaded else [self.patcher.patches_uuid, None]

    def attach(self, adapters: Adapters, *, recompute: str) -> None:
        """Prepare the adapted forwards, with as many blocks computed again in backward as `recompute` says.

        Nothing changes until `adapted()`.
        """
        self._device = adapters.values.device
        self._adapters = {adapter.key: adapter.tensors for adapter in adapters if adapter.layer is None}
        self._attachments = [
            Attachment(
                encoder.transformer,
                adapters,
                CastWeights(),
                prefix=self._prefix(name),
                blocks=BLOCKS,
                recompute=recompute,
                adds_in_place=True,
                same_input=SAME_INPUT,
            )
            for name, encoder in self._encoders.items()
        ]

    def release(self) -> None:
        """Let go of the adapters, until `attach()`."""
        self._attachments, self._adapters = [], {}

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """The encoders compute with their adapters, as this CLIP is set to encode; all undone on any exit."""
        model = self._clip.cond_stage_model
        if model.current_weight_patches_uuid not in self._fitting:
            # A preview, or another node, has put something else onto the shared weights.
            with torch.inference_mode():
                mm.load_models_gpu([self.patcher])
        with ExitStack() as stack:
            stack.enter_context(_options_kept(encoders_of(self._clip)))
            model.reset_clip_options()
            if self._clip.layer_idx is not None:
                model.set_clip_options({"layer": self._clip.layer_idx})
            model.set_clip_options({"execution_device": self._device})
            for attachment in self._attachments:
                stack.enter_context(attachment.attached())
            yield

    def text_of(self, batch: Batch) -> Sequence[dict[str, Tensor]]:
        """What the network is told about each caption, with gradients; inside `adapted()` alone."""
        read = partial(literal_tokens, self._clip)
        if self.tokens is not None:
            state = {
                f"{key}.{name}": tensor for key, tensors in self._adapters.items() for name, tensor in tensors.items()
            }
            read = partial(self.tokens.filled, rows=self.tokens.rows(state))
        known: dict[str, dict[str, Tensor]] = {}
        for caption, cached in zip(batch.captions, batch.text, strict=True):
            if caption not in known:
                known[caption] = self._encoded(read(caption), cached)
        return [known[caption] for caption in batch.captions]

    def _encoded(self, tokens: dict, cached: Mapping[str, Tensor]) -> dict[str, Tensor]:
        model = self._clip.cond_stage_model
        with _remembered(getattr(model, T5, None), tokens, cached):
            cond, pooled, *extra = model.encode_token_weights(tokens)
        return entries_of({"cond": cond, "pooled_output": pooled, **(extra[0] if extra else {})})

    def _prefix(self, name: str) -> str:
        """kohya's name of an encoder's blocks, as ComfyUI maps it (comfy/lora.py, model_lora_keys_clip).

        What lies outside of the blocks is not mapped for every family, so it is out of reach.
        """
        if name == "clip_g":
            number = "2" if "clip_l" in self._encoders else ""
        else:
            number = "1" if len(encoders_of(self._clip)) > 1 else ""
        return f"lora_te{number}_text_model_encoder_layers_"


def _blocks(encoder: nn.Module) -> nn.Module:
    return encoder.transformer.text_model.encoder.layers


@contextmanager
def _options_kept(encoders: Mapping[str, nn.Module]) -> Iterator[None]:
    """Whatever is set on the encoders inside, they are set as before afterwards."""
    before = [(encoder, {name: getattr(encoder, name) for name in OPTIONS}) for encoder in encoders.values()]
    try:
        yield
    finally:
        for encoder, options in before:
            for name, value in options.items():
                setattr(encoder, name, value)


@contextmanager
def _remembered(encoder: nn.Module | None, tokens: dict, cached: Mapping[str, Tensor]) -> Iterator[None]:
    """T5 answers with what it said when the caption was encoded: the last of its text, a row a token."""
    if encoder is None:
        yield
        return
    length = sum(len(chunk) for chunk in tokens[T5])
    said = [cached["cross_attn"][-length:][None], None]
    if "attention_mask" in cached:
        said.append({"attention_mask": cached["attention_mask"][None]})
    vars(encoder)["encode_token_weights"] = lambda _: tuple(said)
    try:
        yield
    finally:
        del vars(encoder)["encode_token_weights"]
