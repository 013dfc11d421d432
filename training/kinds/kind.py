"""What every kind of adapter answers, and the products its forwards are made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LoraConfig
from ..frozen import Weights, forward_of, multiplied

Tensors = Mapping[str, Tensor]
Forward = Callable[[Tensor], Tensor]
Thinned = Callable[[Tensor], Tensor]
"""Adapter dropout: what an adapter reads, some of it left out while training, all of it at any other time."""


class Kind:
    """A way to adapt a layer. `tensors` are the trained ones of a layer by name, in float32.

    A linear layer's weight is (out, in), a convolution's (out, in, height, width); the rank is what the file calls so.
    """

    zero: tuple[str, ...]
    """The tensors that are zero at first, so that nothing is changed; LoRA+ trains them at a rate of their own."""
    factors: tuple[str, ...]
    """The tensors whose product the change is: all are made smaller when it is too large."""
    file_names: Mapping[str, str]
    """Tensor -> what it is called in a file, after the layer's key and a dot."""

    def shapes(self, layer: nn.Module, rank: int, config: LoraConfig) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor for a layer that is adapted with this rank, whatever rank the settings say."""
        raise NotImplementedError

    def start(self, tensors: Tensors, draw: torch.Generator) -> None:
        """Fill the tensors: zero, or Kaiming-uniform with a = sqrt(5), as peft does for each of these kinds."""
        for name, tensor in tensors.items():
            if name in self.zero:
                nn.init.zeros_(tensor)
            else:
                nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=draw)

    def begin(self, layer: nn.Module, tensors: Tensors, scale: float, weights: Weights) -> None:
        """Fill what depends on the layer's weight and was not filled yet; called once the weight can be read."""

    def rank(self, tensors: Tensors) -> int:
        """The rank that alpha is divided by."""
        raise NotImplementedError

    def alpha(self, tensors: Tensors, config: LoraConfig) -> float:
        """The alpha that stands in the file, with which every loader gets the scale right."""
        return config.alpha_for(self.rank(tensors))

    def scale(self, tensors: Tensors, config: LoraConfig) -> float:
        """The factor on the change of a layer's weight: alpha / rank (Hu et al. 2021, section 4.1)."""
        return self.alpha(tensors, config) / self.rank(tensors)

    def forward(self, layer: nn.Module, tensors: Tensors, scale: float, weights: Weights, thinned: Thinned) -> Forward:
        """The adapted layer as a function that autograd can differentiate and that keeps no weight of the layer."""
        raise NotImplementedError

    def norm(self, tensors: Tensors, scale: float) -> Tensor:
        """The Frobenius norm of the change."""
        raise NotImplementedError

    def saved(self, tensors: Tensors) -> dict[str, Tensor]:
        """The tensors as a file holds them, by their names there."""
        return {self.file_names[name]: tensor for name, tensor in tensors.items()}

    def loaded(self, entries: Tensors) -> dict[str, Tensor]:
        """What `saved` gave, turned back."""
        names = {file_name: name for name, file_name in self.file_names.items()}
        return {names[file_name]: tensor for file_name, tensor in entries.items()}


def numbers(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """How many numbers tensors of these shapes hold."""
    return sum(map(math.prod, shapes.values()))


def frozen_forward(layer: nn.Module, weights: Weights) -> Forward:
    """The layer without its adapter, leaving its weight alone."""
    return forward_of(layer, weights, copy_norm_input=False)


def sides(layer: nn.Module) -> tuple[int, int]:
    """How many numbers or channels a layer gives out and takes in."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels, layer.in_channels
    return layer.out_features, layer.in_features


def kernel_of(layer: nn.Module) -> tuple[int, ...]:
    """The window of a convolution; () for a linear layer."""
    return tuple(layer.kernel_size) if isinstance(layer, nn.Conv2d) else ()


def steps_of(layer: nn.Conv2d) -> dict[str, object]:
    """How a convolution moves over its input."""
    return {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}


def product(x: Tensor, weight: Tensor, layer: nn.Module, bias: Tensor | None = None) -> Tensor:
    """x times a weight of the layer's shape, as the layer itself would multiply; not for autograd to follow."""
    if isinstance(layer, nn.Conv2d):
        return F.conv2d(x, weight, bias, **steps_of(layer))
    return multiplied(x, weight, bias)


def product_input_gradient(shape: torch.Size, weight: Tensor, grad: Tensor, layer: nn.Module) -> Tensor:
    """The gradient of `product` for x of that shape."""
    if isinstance(layer, nn.Conv2d):
        return torch.nn.grad.conv2d_input(shape, weight, grad, **steps_of(layer))
    return grad @ weight


class MadeWeight(torch.autograd.Function):
    """y = x W^T for a weight W = make(*tensors) as large as the layer's, made again in backward instead of kept.

    Gradients: dx = g W, and those of the tensors by autograd from dW = g^T x.
    """

    @staticmethod
    def forward(ctx, x, layer, make, *tensors):
        ctx.layer, ctx.make = layer, make
        ctx.save_for_backward(x, *tensors)
        return product(x, make(*tensors).to(x.dtype), layer)

    @staticmethod
    def backward(ctx, grad):
        x, *tensors = ctx.saved_tensors
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in tensors]
            weight = ctx.make(*leaves)
        grad_weight = _weight_gradient(x, weight.shape, grad, ctx.layer).to(weight.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = product_input_gradient(x.shape, weight.detach().to(x.dtype), grad, ctx.layer)
        return grad_x, None, None, *torch.autograd.grad(weight, leaves, grad_weight)


def _weight_gradient(x: Tensor, shape: torch.Size, grad: Tensor, layer: nn.Module) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return torch.nn.grad.conv2d_weight(x, shape, grad, **steps_of(layer))
    return grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


@lru_cache
def peft_shapes(
    kind: str, out: int, into: int, kernel: tuple[int, ...], rank: int, factor: int = -1
) -> dict[str, tuple[int, ...]]:
    """The tensors that peft makes for a layer of this size, by peft's names for them; ImportError without peft.

    `factor` is LoKr's: how many parts a side is divided into, at most; -1 divides near its square root.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError(
            f"The Python package peft cannot be loaded ({error}): bring it and what it needs up to date, for the "
            "Python that runs ComfyUI, with 'python -m pip install --upgrade peft transformers' and restart."
        ) from error

    settings = {
        "lora": lambda: peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"], init_lora_weights=False),
        "loha": lambda: peft.LoHaConfig(r=rank, alpha=rank, target_modules=["layer"], init_weights=False),
        "lokr": lambda: peft.LoKrConfig(
            r=rank, alpha=rank, decompose_factor=factor, target_modules=["layer"], init_weights=False
        ),
    }[kind]()
    # On the meta device nothing is allocated and no global random number is drawn.
    with torch.device("meta"):
        layer = nn.Conv2d(into, out, kernel, bias=False) if kernel else nn.Linear(into, out, bias=False)
        adapted = peft.inject_adapter_in_model(settings, nn.ModuleDict({"layer": layer}))
    names = {
        name.removeprefix("layer.").removesuffix(".weight").removesuffix(".default"): tuple(parameter.shape)
        for name, parameter in adapted.named_parameters()
    }
    return {name: shape for name, shape in names.items() if not name.startswith("base_layer")}
