"""A denoiser of a few thousand weights that trains in milliseconds, and batches to train it on."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_workbench.training.attach import Attachment
from lora_workbench.training.batches import Batch
from lora_workbench.training.config import LoraConfig
from lora_workbench.training.families import LAYER_PRESETS
from lora_workbench.training.frozen import Weights
from lora_workbench.training.lora import Adapters, Part

CHANNELS, WIDTH, TEXT = 4, 16, 8
LAYERS = re.compile(r"\.(attend|widen|narrow)$")


class ResidentWeights:
    """Weights that simply are where they are used."""

    def take(self, layer: nn.Module, like: Tensor) -> tuple[Tensor, Tensor | None, object]:
        bias = getattr(layer, "bias", None)
        return layer.weight.to(like), None if bias is None else bias.to(like), None

    def give_back(self, layer: nn.Module, weight: Tensor, bias: Tensor | None, ticket: object) -> None:
        pass


class Block(nn.Module):
    """Text is added to every place, then a feed-forward layer; new tensors throughout, as in SDXL's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.text_norm = nn.LayerNorm(TEXT, elementwise_affine=False)
        self.attend = nn.Linear(TEXT, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.widen = nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.narrow = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, text: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        x = x + self.attend(self.text_norm(text)).mean(1, keepdim=True)
        return x + self.narrow(F.silu(self.widen(self.norm(x)))), text


class BlockInPlace(Block):
    """The same, but it adds into the tensors it was given and writes into the options, as FLUX's blocks do."""

    def forward(self, x: Tensor, text: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        options["blocks_seen"] = options.get("blocks_seen", 0) + 1
        x += self.attend(self.text_norm(text)).mean(1, keepdim=True)
        x += self.narrow(F.silu(self.widen(self.norm(x))))
        text *= 0.5 * options["blocks_seen"]
        return x, text


class Network(nn.Module):
    """Convolution in, blocks, group norm, convolution out: one of each kind of layer there is."""

    def __init__(self, block: type[Block] = Block, seed: int = 0) -> None:
        super().__init__()
        self.into = nn.Conv2d(CHANNELS, WIDTH, 3, padding=1)
        self.noise_level = nn.Linear(3, WIDTH)
        self.blocks = nn.ModuleList(block() for _ in range(2))
        self.norm = nn.GroupNorm(4, WIDTH)
        self.out = nn.Conv2d(WIDTH, CHANNELS, 3, padding=1)
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for tensor in self.parameters():
                tensor.copy_(torch.randn(tensor.shape, generator=random) * 0.2)
        self.requires_grad_(False)

    def forward(self, noisy: Tensor, sigma: Tensor, text: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = noisy.shape[-2:]
        told = torch.stack([sigma, *(torch.full_like(sigma, side / 64) for side in size)], 1)
        x = (self.into(noisy) + self.noise_level(told)[..., None, None]).flatten(2).transpose(1, 2)
        text, options = text.clone(), {}
        for block in self.blocks:
            x, text = block(x, text, options)
        return self.out(self.norm(x.transpose(1, 2).reshape(len(noisy), WIDTH, height, width)))


def question() -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Two noisy pictures with noise levels, texts and a size, as a network is asked."""
    random = torch.Generator().manual_seed(5)
    return (
        torch.randn(2, CHANNELS, 8, 8, generator=random),
        torch.tensor([0.5, 3.0]),
        torch.randn(2, 3, TEXT, generator=random),
        (64, 64),
    )


def part(network: nn.Module, pattern: str = LAYERS.pattern) -> Part:
    """A network with one pattern for every preset."""
    return Part("lora_unet_", network, dict.fromkeys(LAYER_PRESETS, pattern))


class Denoiser:
    """A Denoiser of the training loop over a toy network."""

    loss_scale = 1.0
    parts = 1
    device = torch.device("cpu")

    def __init__(
        self, prediction: str = "eps", *, block: type[Block] = Block, checkpointing: bool = False, rank: int = 4
    ) -> None:
        self.prediction = prediction
        self.sigmas = None if prediction == "flow" else torch.linspace(0.03, 14.6, 1000)
        self.network = Network(block)
        self.adapters = Adapters.build([part(self.network)], LoraConfig(rank=rank), seed=0)
        self.attach(self.adapters, checkpointing=checkpointing)

    def attach(self, adapters: Adapters, *, checkpointing: bool, weights: Weights | None = None) -> None:
        self.attachment = Attachment(
            self.network,
            adapters,
            weights or ResidentWeights(),
            blocks=("Block", "BlockInPlace") if checkpointing else (),
            adds_in_place=isinstance(self.network.blocks[0], BlockInPlace),
        )

    @contextmanager
    def adapted(self):
        with torch.enable_grad(), self.attachment.attached():
            yield

    @contextmanager
    def base(self):
        adapted = [module.__dict__.pop("forward", None) for module in self.network.modules()]
        try:
            with torch.no_grad():
                yield
        finally:
            for module, forward in zip(self.network.modules(), adapted, strict=True):
                if forward is not None:
                    module.__dict__["forward"] = forward

    def text_of(self, batch: Batch) -> Sequence[dict[str, Tensor]]:
        return batch.text

    def __call__(
        self, noisy: Tensor, sigma: Tensor, text: Sequence[dict[str, Tensor]], size: tuple[int, int]
    ) -> Tensor:
        return self.network(noisy, sigma, torch.stack([entry["cross_attn"] for entry in text]), size)


class Batches:
    """An endless sequence of batches of toy pictures; those whose numbers are in `broken` hold a NaN."""

    SIZES = ((64, 64), (96, 64))

    def __init__(self, batch_size: int = 1, broken: Collection[int] = ()) -> None:
        self.batch_size, self.broken = batch_size, broken

    def __getitem__(self, number: int) -> Batch:
        width, height = size = self.SIZES[number % 2]
        random = torch.Generator().manual_seed(number % 5)
        latents = 0.2 * torch.randn(self.batch_size, CHANNELS, height // 8, width // 8, generator=random) + 1
        if number in self.broken:
            latents[0, 0, 0, 0] = torch.nan
        text = tuple({"cross_attn": torch.randn(3, TEXT, generator=random)} for _ in range(self.batch_size))
        return Batch(
            latents, text, size, tuple(f"picture_{number % 5}_{place}.png" for place in range(self.batch_size))
        )


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Whether two sets of tensors are the same, bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
