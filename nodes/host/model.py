"""A loaded MODEL as training sees it: a Denoiser over the weights that are already in the graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import comfy.model_base
import comfy.model_management as mm
import comfy.ops
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor, nn

from ...training.attach import Attachment
from ...training.config import LoraConfig
from ...training.families import FAMILIES, Family
from ...training.frozen import is_linear
from ...training.lora import Adapters
from ...training.noise import EPS, FLOW, V
from .identity import identity_of

HALF_PRECISION_LOSS_SCALE = 1024.0
_GIB = 1024**3


class CastWeights:
    """Weights read through ComfyUI's own casting, so streamed, paged, patched and quantised layers all work."""

    def take(self, layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None, object]:
        comfy.ops.run_every_op()
        weight = layer.weight
        if _is_ready(layer, weight, like):
            return weight, layer.bias, None
        return comfy.ops.cast_bias_weight(layer, like, offloadable=True)

    def give_back(self, layer: nn.Module, weight: Tensor, bias: Tensor | None, ticket: object) -> None:
        if ticket is not None:
            comfy.ops.uncast_bias_weight(layer, weight, bias, ticket)


def _is_ready(layer: nn.Module, weight: Tensor, like: Tensor) -> bool:
    """Whether the weight can be multiplied with as it is: nothing to move, cast, page in, dequantise or patch."""
    if weight.dtype != like.dtype or weight.device != like.device:
        return False
    state = layer.__dict__
    return not (
        "_v" in state or state.get("weight_function") or state.get("bias_function") or type(weight) is not nn.Parameter
    )


def family_of(model) -> Family:
    """The family of a MODEL; ValueError saying why when it cannot be trained."""
    base = model.model
    kind = type(base)
    name = {comfy.model_base.SDXL: "sdxl", comfy.model_base.Flux: "flux"}.get(kind)
    if name is None:
        supported = " or ".join(family.title for family in FAMILIES.values())
        raise ValueError(f"This MODEL is a {kind.__name__}, which cannot be trained yet: load an {supported} model.")
    if base.concat_keys or _extra_channels(base):
        raise ValueError(
            f"This {FAMILIES[name].title} MODEL is an inpainting or control variant, which takes a second picture: "
            "load the plain model to train on."
        )
    return FAMILIES[name]


def _extra_channels(base) -> bool:
    config = base.model_config.unet_config
    return config["in_channels"] != config["out_channels"]


def prediction_of(model) -> str:
    """ "eps", "v" or "flow", read from how the MODEL samples (and from what is patched onto it)."""
    from comfy.model_sampling import CONST
    from comfy.model_sampling import EPS as Epsilon
    from comfy.model_sampling import V_PREDICTION as Velocity

    # Many kinds inherit from these three and then mean something else; what the answer means is in one method.
    meaning = type(model.get_model_object("model_sampling")).calculate_denoised
    known = {Epsilon.calculate_denoised: EPS, Velocity.calculate_denoised: V, CONST.calculate_denoised: FLOW}
    if meaning not in known:
        raise ValueError(
            f"This MODEL samples as {meaning.__qualname__.split('.')[0]}, an objective that cannot be trained: "
            "remove the node that changes its sampling."
        )
    return known[meaning]


class LoadedModel:
    """The Denoiser of the training loop, over a MODEL in place.

    Its weights are read and never kept, copied, cast in place or changed; between two `adapted()` blocks the model
    is exactly what every other node knows.
    """

    def __init__(self, model) -> None:
        self.family = family_of(model)
        self.prediction = prediction_of(model)
        # A clone shares the weights; it keeps what is patched onto this MODEL apart from what other nodes patch.
        self.patcher = model.clone()
        self.device = self.patcher.load_device
        self.dtype = _compute_dtype(model.model, self.device)
        self.loss_scale = HALF_PRECISION_LOSS_SCALE if self.dtype == torch.float16 else 1.0
        sampling = model.get_model_object("model_sampling")
        self.sigmas = None if self.prediction == FLOW else sampling.sigmas.detach().float().cpu().clone()
        self._attachment: Attachment | None = None
        self.identity = identity_of(model)

    @property
    def context_width(self) -> int | None:
        """How wide the text is that the network takes; None when its configuration does not say."""
        config = self.patcher.model.model_config.unet_config
        return config.get("context_in_dim", config.get("context_dim"))

    @property
    def pooled_width(self) -> int | None:
        """How wide the pooled text is: SDXL adds six sizes of 256 numbers each to it."""
        config = self.patcher.model.model_config.unet_config
        sizes = config.get("adm_in_channels")
        return config.get("vec_in_dim") if sizes is None else sizes - 6 * 256

    @property
    def network(self) -> nn.Module:
        return self.patcher.model.diffusion_model

    def load(self, working_memory: int = 0) -> None:
        """Have ComfyUI load the MODEL with everything patched onto it, leaving `working_memory` bytes free."""
        with torch.inference_mode():
            mm.load_models_gpu([self.patcher], memory_required=working_memory)

    def adapted_width(self, lora: LoraConfig) -> int:
        """Inputs plus outputs of all the layers a LoRA adapts: times its rank, the number of trained values."""
        pattern = self.family.layer_pattern(lora.layers)
        layers = (layer for name, layer in self.network.named_modules() if pattern.search(name) and is_linear(layer))
        return sum(layer.in_features + layer.out_features for layer in layers)

    def attach(self, adapters: Adapters, *, checkpointing: bool) -> None:
        """Prepare the adapted forwards; nothing changes until `adapted()`."""
        self._attachment = Attachment(
            self.network,
            adapters.to(self.device),
            CastWeights(),
            blocks=self.family.blocks if checkpointing else (),
            adds_in_place=self.family.adds_in_place,
            same_input=self.family.same_input,
        )

    def needs_checkpointing(self, resolution: int, batch_size: int) -> bool:
        """True when the activations of a step would not fit beside the model in the memory that is free now."""
        needed = self.working_memory(resolution, batch_size, checkpointing=False)
        free = mm.get_free_memory(self.device)
        if not mm.is_device_cpu(self.device):
            free -= max(0, self.patcher.model_size() - self.patcher.loaded_size())
        return needed * 1.2 > free

    def working_memory(self, resolution: int, batch_size: int, checkpointing: bool) -> int:
        """Bytes of activations a step keeps: all of them, or with checkpointing about a twelfth."""
        needed = self.family.activations_gib * _GIB * batch_size * (resolution / 1024) ** 2
        needed *= 2 if self.dtype == torch.float32 else 1
        return int(needed / 12 if checkpointing else needed)

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """Autograd on, ComfyUI in training, adapters attached; all undone on any exit."""
        if self.patcher.model.current_weight_patches_uuid != self.patcher.patches_uuid:
            # Another node, or a preview, has put something else onto the shared weights.
            self.load()
        was_training = mm.in_training
        with torch.inference_mode(False), torch.enable_grad(), self._attachment.attached():
            # Without this ComfyUI picks kernels that have no backward.
            mm.in_training = True
            try:
                yield
            finally:
                mm.in_training = was_training

    def __call__(
        self, noisy: Tensor, sigma: Tensor, text: Sequence[dict[str, Tensor]], size: tuple[int, int]
    ) -> Tensor:
        """The raw answer of the network, before ComfyUI turns it into a clean picture.

        Texts of different length go through the network in turn, since padding would change what they say.
        """
        by_length: dict[int, list[int]] = {}
        for number, entry in enumerate(text):
            by_length.setdefault(entry["cross_attn"].shape[0], []).append(number)
        if len(by_length) == 1:
            return self._forward(noisy, sigma, text, size)
        answers = [self._forward(noisy[i], sigma[i], [text[n] for n in i], size) for i in by_length.values()]
        order = torch.tensor([number for group in by_length.values() for number in group])
        return torch.cat(answers)[order.argsort().to(noisy.device)]

    def _forward(
        self, noisy: Tensor, sigma: Tensor, text: Sequence[dict[str, Tensor]], size: tuple[int, int]
    ) -> Tensor:
        base = self.patcher.model
        sampling = self.patcher.get_model_object("model_sampling")
        conditions = self._conditions(noisy, text, size)
        context = conditions.pop("c_crossattn").to(device=noisy.device, dtype=self.dtype)
        extra = {k: comfy.model_base.convert_tensor(v, self.dtype, noisy.device) for k, v in conditions.items()}
        options = {**self.patcher.model_options.get("transformer_options", {}), "optimized_attention_override": _sdpa}
        return base.diffusion_model(
            sampling.calculate_input(sigma, noisy).to(self.dtype),
            sampling.timestep(sigma).float(),
            context=context,
            control=None,
            transformer_options=options,
            **extra,
        ).float()

    def _conditions(self, noisy: Tensor, text: Sequence[dict[str, Tensor]], size: tuple[int, int]) -> dict[str, Tensor]:
        """What ComfyUI feeds the network beside the picture, made for each sample on its own and then stacked.

        Sizes are the bucket's with no crop, which is what ComfyUI feeds at inference when nothing else is said.
        """
        width, height = size
        extra = {} if self.family.guidance is None else {"guidance": self.family.guidance}
        samples = []
        for entry in text:
            conditions = self.patcher.model.extra_conds(
                **{name: tensor[None].to(self.device) for name, tensor in entry.items()},
                noise=noisy[:1],
                latent_image=noisy[:1],
                device=self.device,
                prompt_type="positive",
                width=width,
                height=height,
                **extra,
            )
            samples.append({k: v.process_cond(batch_size=1, area=None).cond for k, v in conditions.items()})
        return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


def _sdpa(_chosen, *args, **kwargs) -> Tensor:
    """PyTorch's attention in place of whatever was chosen at start: some of those have no backward, or a wrong one."""
    return attention_pytorch(*args, **kwargs)


def _compute_dtype(base, device: torch.device) -> torch.dtype:
    """The model's own inference dtype, but bfloat16 for float16 where the device has it: it needs no loss scale."""
    dtype = base.get_dtype_inference()
    if dtype == torch.float16 and mm.should_use_bf16(device):
        return torch.bfloat16
    return dtype
