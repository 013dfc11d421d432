"""Pretrain a toy base on drawn pictures: `python tests/toyworld/pretrain.py sdxl --comfyui ComfyUI --minutes 12`.

Everything is drawn and encoded up front; a step then costs one forward and one backward of the tiny network.
"""

import argparse
import math
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy
import safetensors.torch
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
EMPTY_CAPTIONS = 0.1
NOISY_WEIGHT = 50.0
VPRED_TRAINED = ("time_embed.", "out.", "emb_layers.", "output_blocks.3.")


@dataclass
class Pool:
    """Encoded pictures and captions: latents (N, C, h, w), context (N, tokens, dim) in fp16, pooled (N, dim)."""

    latents: Tensor
    context: Tensor
    pooled: Tensor

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Random pictures with their captions; row 0 of the pool is the empty caption and replaces one in ten."""
        picture = torch.randint(1, len(self.latents), (size,), generator=generator)
        empty = torch.rand(size, generator=generator) < EMPTY_CAPTIONS
        said = torch.where(empty, 0, picture)
        return self.latents[picture], self.context[said].float(), self.pooled[said]


def draw_pool(model, clip, vae, count: int, seed: int) -> Pool:
    """Draw and encode ``count`` pictures; a caption that leaves something open gets a random picture that fits."""
    from toyworld import drawing

    chance = random.Random(f"pretraining {seed}")
    texts, latents = [""], [torch.zeros(1)]
    while len(texts) < count:
        scene = drawing.random_scene(chance)
        texts.append(drawing.caption(scene, chance))
        latents.append(numpy.asarray(drawing.draw(scene.complete(chance), chance)))
    pixels = torch.from_numpy(numpy.stack(latents[1:]))
    encoded = [model.model.process_latent_in(vae.encode(part.float() / 255)) for part in pixels.split(256)]
    conds = [clip.encode_from_tokens(clip.tokenize(text), return_pooled=True) for text in texts]
    return Pool(
        torch.cat([torch.zeros_like(encoded[0][:1]), *encoded]),
        torch.cat([context.half() for context, _ in conds]),
        torch.cat([pooled for _, pooled in conds]),
    )


def size_ids(base, pooled: Tensor, generator: torch.Generator) -> Tensor:
    """SDXL's vector of pooled text and six sizes; half are native, half random, so that the base heeds none of them."""
    batch = len(pooled)
    native = torch.tensor([128.0, 128.0, 0.0, 0.0, 128.0, 128.0]).expand(batch, 6)
    anything = torch.rand(batch, 6, generator=generator) * torch.tensor([960.0, 960.0, 200.0, 200.0, 192.0, 192.0])
    anything = anything.floor() + torch.tensor([64.0, 64.0, 0.0, 0.0, 64.0, 64.0])
    ids = torch.where(torch.rand(batch, 1, generator=generator) < 0.5, native, anything)
    return torch.cat([pooled, base.embedder(ids.flatten()).view(batch, -1)], dim=1)


def random_sigma(base, flow: bool, batch: int, generator: torch.Generator) -> Tensor:
    """Noise levels: any of the 1000 discrete ones, or for flow half uniform, half through the sampler's shift."""
    u = torch.rand(batch, generator=generator)
    if not flow:
        return base.model_sampling.sigma(torch.floor(u * 1000))
    u = u * 0.999 + 0.001
    shift = math.exp(1.15)
    return torch.where(torch.rand(batch, generator=generator) < 0.5, u, shift * u / (1 + (shift - 1) * u))


def loss_of(base, kind: str, pool: Pool, size: int, generator: torch.Generator) -> Tensor:
    """Mean squared error of the raw network output on one random batch."""
    x0, context, pooled = pool.batch(size, generator)
    noise = torch.randn(x0.shape, generator=generator)
    sigma = random_sigma(base, kind == "flux", size, generator)
    sampling = base.model_sampling
    xt = sampling.noise_scaling(sigma.view(-1, 1, 1, 1), noise, x0)
    s = sigma.view(-1, 1, 1, 1)
    if kind == "flux":
        guidance = torch.where(
            torch.rand(size, generator=generator) < 0.5, 1.0, torch.rand(size, generator=generator) * 5
        )
        extra, target = {"y": pooled, "guidance": guidance}, noise - x0
    else:
        extra = {"y": size_ids(base, pooled, generator)}
        target = noise if kind == "sdxl" else (noise - s * x0) / (1 + s**2).sqrt()
    output = base.diffusion_model(
        sampling.calculate_input(s, xt),
        sampling.timestep(sigma).float(),
        context=context,
        transformer_options={},
        **extra,
    )
    error = (output - target).square().mean((1, 2, 3))
    # An eps model's error counts sigma times in the picture, so noisy levels weigh more, up to a limit.
    weight = (1 + sigma**2).clamp(max=NOISY_WEIGHT) if kind == "sdxl" else torch.ones_like(sigma)
    return (weight * error).mean() / weight.mean()


def initialise(network: torch.nn.Module, seed: int) -> None:
    """Matrices by fan-in, output layers of residual branches at zero as their papers have them, norms at one."""
    generator = torch.Generator().manual_seed(seed)
    zero = (
        "out_layers.3.weight",
        "out.2.weight",
        "final_layer.linear.weight",
        "mod.lin.weight",
        "adaLN_modulation.1.weight",
    )
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim < 2:
                weight.fill_(1.0 if name.endswith(("weight", "scale")) else 0.0)
            elif name.endswith(zero):
                weight.zero_()
            else:
                weight.normal_(0.0, 0.8 * weight[0].numel() ** -0.5, generator=generator)


def pretrain(
    kind: str, minutes: float, batch: int, peak: float, pool_size: int, start: Path | None, seed: int = 0
) -> None:
    """Train for a given time, writing the averaged weights every three minutes and at the end."""
    import comfy.model_management

    from toyworld.node_pack import models, text, vae

    model = models.build(kind)
    base, network = model.model, model.model.diffusion_model
    clip = (text.flux_clip if kind == "flux" else text.sdxl_clip)(seed=1)
    pool = draw_pool(
        model, clip, vae.analytic_vae(base.latent_format.latent_channels, base.latent_format), pool_size, seed
    )
    initialise(network, seed)
    if start:
        network.load_state_dict({k: v.float() for k, v in safetensors.torch.load_file(start).items()}, strict=False)
    everything = kind != "sdxl_vpred"
    chosen = [p for n, p in network.named_parameters() if everything or any(key in n for key in VPRED_TRAINED)]
    for weight in chosen:
        weight.requires_grad_(True)
    if kind == "flux":
        _out_of_place(network)
    comfy.model_management.in_training = True
    average = [p.detach().clone() for p in chosen]
    optimizer = torch.optim.AdamW(chosen, lr=peak, betas=(0.9, 0.99), weight_decay=0.01)
    generator = torch.Generator().manual_seed(seed)
    begin = saved = time.monotonic()
    step, recent = 0, []
    while (share := (time.monotonic() - begin) / (60 * minutes)) < 1:
        rate = peak * min(1, (step + 1) / 100) * (0.02 + 0.98 * min(1, 2 * (1 - share)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(base, kind, pool, batch, generator)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        keep = min(0.999, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, chosen, 1 - keep)
        recent.append(loss.item())
        if step % 200 == 0:
            mean, seconds = sum(recent) / len(recent), time.monotonic() - begin
            print(f"{kind} step {step} {seconds:.0f} s loss {mean:.4f}", flush=True)
            recent = []
        if time.monotonic() - saved > 180:
            saved = time.monotonic()
            write(kind, network, chosen, average)
    write(kind, network, chosen, average)


def write(kind: str, network: torch.nn.Module, chosen: list[Tensor], average: list[Tensor]) -> None:
    """Store the averaged weights in half precision; those that were not trained are not stored."""
    where = {id(p): mean for p, mean in zip(chosen, average, strict=True)}
    tensors = {n: where[id(p)].half().contiguous() for n, p in network.named_parameters() if id(p) in where}
    path = HERE / "node_pack" / "weights" / f"{kind}.safetensors"
    safetensors.torch.save_file(tensors, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def _out_of_place(network: torch.nn.Module) -> None:
    """ComfyUI's FLUX blocks write into their inputs, which autograd needs: hand copies to the norms and the blocks."""
    for name, module in network.named_modules():
        if name.rsplit(".", 1)[-1] in ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2", "pre_norm"):
            module.register_forward_pre_hook(lambda _, inputs: (inputs[0].clone(), *inputs[1:]))
        elif type(module).__name__ in ("DoubleStreamBlock", "SingleStreamBlock"):
            module.register_forward_pre_hook(_copy_inputs, with_kwargs=True)


def _copy_inputs(_, inputs, named):
    inputs = tuple(v.clone() if i == 0 and torch.is_tensor(v) else v for i, v in enumerate(inputs))
    return inputs, {k: v.clone() if k in ("img", "txt", "x") else v for k, v in named.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("sdxl", "sdxl_vpred", "flux"))
    parser.add_argument("--comfyui", type=Path, default=Path("~/comfy/ComfyUI"))
    parser.add_argument("--minutes", type=float, default=12)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--pictures", type=int, default=10000)
    parser.add_argument("--start", type=Path, help="weights to start from; the v-prediction twin needs SDXL's")
    chosen = parser.parse_args()
    sys.path[:0] = [str(chosen.comfyui.expanduser()), str(HERE.parent)]
    from comfy.cli_args import args

    args.cpu = True
    torch.set_num_threads(1)
    pretrain(chosen.kind, chosen.minutes, chosen.batch, chosen.rate, chosen.pictures, chosen.start)


if __name__ == "__main__":
    main()
