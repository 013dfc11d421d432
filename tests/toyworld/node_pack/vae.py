"""An autoencoder that is arithmetic alone: block means in, an edge-keeping enlargement out. Nothing is learned."""

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import torch
import torch.nn.functional as F
from comfy.ldm.models.autoencoder import AutoencoderKL
from torch import Tensor, nn

BLOCK = 8
COLOUR_GAIN = 1.2
DETAIL_GAIN = 12.0
SHARPNESS = 2.5


class BlockMeans(nn.Module):
    """Each 8 x 8 block becomes ``cells`` x ``cells`` cells of four numbers: mean red, green, blue, and light detail.

    Detail is the mean of a cell's middle quarter minus the mean of the cell. Latents are in the units of
    ``latent_format``, so that process_latent_in() of the model brings them to a spread of about one.
    """

    def __init__(self, cells: int, latent_format):
        super().__init__()
        self.cells = cells
        self.pixels = BLOCK // cells
        self.latent_format = latent_format
        self.gain = nn.Parameter(torch.tensor([COLOUR_GAIN] * 3 + [DETAIL_GAIN]), requires_grad=False)

    def encode(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in -1..1 to (B, 4 * cells ** 2, H / 8, W / 8)."""
        mean = F.avg_pool2d(x, self.pixels)
        z = torch.cat([mean, self._detail(x)], dim=1) * self._gain(x)
        return self.latent_format.process_out(F.pixel_unshuffle(z, self.cells))

    def decode(self, z: Tensor) -> Tensor:
        """(B, 4 * cells ** 2, h, w) to (B, 3, 8 h, 8 w): enlarged cell means, steepened where neighbours differ."""
        z = F.pixel_shuffle(self.latent_format.process_in(z), self.cells) / self._gain(z)
        mean, detail = z[:, :3], z[:, 3:]
        size = (z.shape[-2] * self.pixels, z.shape[-1] * self.pixels)
        smooth = F.interpolate(mean, size=size, mode="bicubic")
        missing = detail - self._detail(smooth)
        smooth = smooth + F.interpolate(missing, size=size, mode="bilinear") * self._pattern(size, z)
        padded = F.pad(mean, (1, 1, 1, 1), mode="replicate")
        high = F.interpolate(F.max_pool2d(padded, 3, stride=1), size=size, mode="bilinear")
        low = F.interpolate(-F.max_pool2d(-padded, 3, stride=1), size=size, mode="bilinear")
        share = (smooth - low) / (high - low + 0.05)
        return low + (high - low) * ((share - 0.5) * SHARPNESS + 0.5).clamp(0, 1)

    def _gain(self, like: Tensor) -> Tensor:
        return self.gain.to(device=like.device, dtype=like.dtype).view(1, 4, 1, 1)

    def _detail(self, x: Tensor) -> Tensor:
        weights = self._pattern((x.shape[-2], x.shape[-1]), x).clamp(min=0) * 4 - 1
        return F.avg_pool2d(x.mean(1, keepdim=True) * weights, self.pixels)

    def _pattern(self, size: tuple[int, int], like: Tensor) -> Tensor:
        """One in the middle quarter of every cell, minus a third around it."""
        place = torch.arange(self.pixels, device=like.device)
        middle = (place >= self.pixels // 4) & (place < self.pixels - self.pixels // 4)
        cell = torch.where(middle[:, None] & middle[None, :], 1.0, -1.0 / 3.0).to(like.dtype)
        return cell.repeat(size[0] // self.pixels, size[1] // self.pixels)


def analytic_vae(latent_channels: int, latent_format) -> comfy.sd.VAE:
    """A ComfyUI VAE object around BlockMeans, for 4 or 16 latent channels."""
    size = {
        "double_z": True,
        "z_channels": 4,
        "resolution": 32,
        "in_channels": 3,
        "out_ch": 3,
        "ch": 32,
        "ch_mult": [1],
    }
    rest = {"num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    settings = {"ddconfig": {**size, **rest}, "embed_dim": 4}
    placeholder = AutoencoderKL(**settings).state_dict()
    stock = comfy.sd.VAE(sd=placeholder, config={"params": settings}, dtype=torch.float32)
    stock.first_stage_model = BlockMeans({4: 1, 16: 2}[latent_channels], latent_format).eval()
    stock.latent_channels = latent_channels
    stock.size = None
    stock.disable_offload = True
    stock.patcher = comfy.model_patcher.ModelPatcher(
        stock.first_stage_model,
        load_device=stock.device,
        offload_device=comfy.model_management.vae_offload_device(),
    )
    return stock
