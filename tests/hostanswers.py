"""What a MODEL answers: through ComfyUI's own samplers, and as training asks it."""

from __future__ import annotations

import comfy.model_management as mm
import comfy.sampler_helpers
import comfy.samplers
import hosttoys
import torch


def sampler_condition(kind, entry):
    """A caption as the sampler gets it from CLIPTextEncode, with the guidance that training uses."""
    extra = {"guidance": 1.0} if kind == "flux" else {}
    return [entry["cross_attn"][None], {"pooled_output": entry["pooled_output"][None], **extra}]


def denoised_by_comfyui(patcher, kind, noisy, sigma, *entries):
    """What ComfyUI's samplers make of noisy latents; several captions are averaged, as samplers do."""
    mm.load_models_gpu([patcher])
    positive = comfy.sampler_helpers.convert_cond([sampler_condition(kind, entry) for entry in entries])
    with torch.inference_mode():
        patcher.pre_run()
        conditions = comfy.samplers.process_conds(
            patcher.model, noisy, {"positive": positive}, noisy.device, latent_image=noisy
        )["positive"]
        (answer,) = comfy.samplers.calc_cond_batch(patcher.model, [conditions], noisy, sigma, patcher.model_options)
        patcher.cleanup()
    return answer.clone()


def denoised_by_us(denoiser, noisy, sigma, entries, size=hosttoys.SIZE):
    with denoiser.adapted(), torch.no_grad():
        raw = denoiser(noisy, sigma, entries, size)
    return denoiser.patcher.get_model_object("model_sampling").calculate_denoised(sigma, raw, noisy)
