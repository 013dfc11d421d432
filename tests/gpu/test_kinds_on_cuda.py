"""Every kind of adapter computes on a CUDA device what it computes on the CPU."""

import pytest
import torch
from torch import nn
from toys import ResidentWeights

from lora_workbench.training.attach import Attachment
from lora_workbench.training.config import KINDS, LoraConfig
from lora_workbench.training.families import LAYER_PRESETS
from lora_workbench.training.lora import Adapters, Part

pytestmark = pytest.mark.gpu


def answer_and_gradients(kind, layer, x, device):
    random = torch.Generator().manual_seed(0)
    network = nn.ModuleDict({"layer": layer().requires_grad_(False)})
    with torch.no_grad():
        for tensor in network.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=random) * 0.2)
    network.to(device)
    config = LoraConfig(rank=4, alpha=2.0, kind=kind, include="layer")
    adapters = Adapters.build([Part("lora_unet_", network, dict.fromkeys(LAYER_PRESETS, "^$"))], config, 0).to(device)
    attachment = Attachment(network, adapters, ResidentWeights())
    with torch.no_grad():
        drawn = torch.randn(adapters.values.shape, generator=random) * 0.1
        adapters.values.add_(drawn.to(device))
    with attachment.attached():
        answer = network["layer"](x.to(device))
        answer.square().sum().backward()
    return answer.cpu(), adapters.values.grad.cpu()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("convolution", [False, True], ids=["linear", "3 x 3"])
def test_values_and_gradients_are_those_of_the_cpu(kind, convolution):
    def layer():
        return nn.Conv2d(16, 24, 3, padding=1) if convolution else nn.Linear(16, 24)

    x = torch.randn((2, 16, 8, 8) if convolution else (2, 5, 16), generator=torch.Generator().manual_seed(1))
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        on_cuda, expected = (answer_and_gradients(kind, layer, x, device) for device in ("cuda", "cpu"))
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed
    for one, other in zip(on_cuda, expected, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm()


def test_dropout_leaves_out_the_same_when_asked_again():
    network = nn.ModuleDict({"layer": nn.Linear(16, 24)})
    part = Part("lora_unet_", network, dict.fromkeys(LAYER_PRESETS, "layer"))
    adapters = Adapters.build([part], LoraConfig(dropout=0.3), 0).to(torch.device("cuda"))
    (adapter,) = adapters
    x = torch.ones(64, 64, device="cuda")
    with adapters.dropping(0, 1):
        assert torch.equal(adapters.thinned(adapter, x), adapters.thinned(adapter, x))
        assert (adapters.thinned(adapter, x) == 0).any()
