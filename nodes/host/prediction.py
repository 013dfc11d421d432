"""What the network of a MODEL answers: noise, velocity or flow."""

from __future__ import annotations

from comfy.model_sampling import CONST, V_PREDICTION
from comfy.model_sampling import EPS as EPSILON

from ...training.noise import EPS, FLOW, V


def prediction_of(model) -> str:
    """ "eps", "v" or "flow", read from how the MODEL samples (and from what is patched onto it)."""
    # Many kinds inherit from these three and then mean something else; what the answer means is in one method.
    meaning = type(model.get_model_object("model_sampling")).calculate_denoised
    known = {EPSILON.calculate_denoised: EPS, V_PREDICTION.calculate_denoised: V, CONST.calculate_denoised: FLOW}
    if meaning not in known:
        raise ValueError(
            f"This MODEL samples as {meaning.__qualname__.split('.')[0]}, an objective that cannot be trained: "
            "remove the node that changes its sampling."
        )
    return known[meaning]
