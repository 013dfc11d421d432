"""What the network of a MODEL answers: noise, velocity or flow."""

from __future__ import annotations

import torch
from comfy.model_sampling import CONST, V_PREDICTION
from comfy.model_sampling import EPS as EPSILON
from torch import Tensor

from ...training.noise import EPS, FLOW, V

# What an answer means and how noise is mixed in are in three methods. Many kinds inherit from these and change one.
KNOWN = {
    (kind.calculate_denoised, kind.calculate_input, kind.noise_scaling): meaning
    for kind, meaning in ((EPSILON, EPS), (V_PREDICTION, V), (CONST, FLOW))
}
FACTOR = {EPS: "sigma_data", V: "sigma_data", FLOW: "noise_scale"}
"""What else noise, or noise and picture, may be multiplied with."""
_REMEDY = "remove the node that changes its sampling, or load another model"


def prediction_of(model) -> str:
    """ "eps", "v" or "flow", read from how the MODEL samples (and from what is patched onto it).

    ValueError for any other objective.
    """
    sampling = model.get_model_object("model_sampling")
    kind = type(sampling)
    meaning = KNOWN.get((kind.calculate_denoised, kind.calculate_input, kind.noise_scaling))
    if meaning is None:
        name = kind.calculate_denoised.__qualname__.split(".")[0]
        raise ValueError(f"This MODEL samples as {name}, an objective that cannot be trained: {_REMEDY}.")
    factor = float(getattr(sampling, FACTOR[meaning], 1.0))
    if factor != 1.0:
        raise ValueError(f"This MODEL samples with {FACTOR[meaning]} {factor:g}, and only 1 can be trained: {_REMEDY}.")
    return meaning


def answering_raw(base, sampling, dtype: torch.dtype):
    """The loaded model `base` as ComfyUI runs it, step by step, except that it returns the network's own answer.

    It computes in `dtype` and samples as `sampling`. A shallow twin: weights and network are the same objects, and
    what is set on it is not set on `base`.
    """
    twin = object.__new__(type(base))
    twin.__dict__.update(base.__dict__)
    twin.__dict__["_modules"] = {**base._modules, "model_sampling": _RawAnswer(sampling)}
    twin.__dict__["get_dtype_inference"] = lambda: dtype
    # Weights are read layer by layer, not in the order in which ComfyUI would fetch them ahead.
    twin.__dict__["current_patcher"] = None
    return twin


class _RawAnswer:
    """A model's sampling, but the answer is handed on as it is instead of being turned into a clean picture."""

    def __init__(self, sampling) -> None:
        self._sampling = sampling

    def __getattr__(self, name: str):
        return getattr(self._sampling, name)

    def calculate_denoised(self, sigma: Tensor, model_output: Tensor, model_input: Tensor) -> Tensor:
        return model_output
