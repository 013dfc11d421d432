"""A loaded MODEL as training sees it: a Denoiser over the weights that are already in the graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import comfy.model_management as mm
import torch
from comfy.ldm.modules.attention import attention_pytorch
from torch import Tensor, nn

from ...training.attach import Attachment
from ...training.batches import Batch
from ...training.lora import Adapters
from ...training.memory import MemoryPlan, Needs
from ...training.noise import FLOW
from .architecture import family_of, is_single_frame, text_widths
from .conditions import Conditions, conditions_of, groups
from .identity import identity_of
from .memory import give_back_memory, is_dynamic, telling_out_of_memory
from .prediction import answering_raw, prediction_of
from .text_training import TrainedText
from .weights import CastWeights, trainable_around

HALF_PRECISION_LOSS_SCALE = 1024.0
_ROOMY = MemoryPlan()


class LoadedModel:
    """The Denoiser of the training loop, over a MODEL in place.

    Its weights are read and never kept, copied, cast in place or changed; between two `adapted()` blocks the model
    is exactly what every other node knows.
    """

    def __init__(self, model, text: TrainedText | None = None) -> None:
        """With `text` the encoded captions are computed anew in every step, by text encoders in training."""
        self._text = text
        self.family = family_of(model)
        self.prediction = prediction_of(model)
        # A clone shares the weights; it keeps what is patched onto this MODEL apart from what other nodes patch.
        self.patcher = model.clone()
        self.device = self.patcher.load_device
        self.dtype = _compute_dtype(model.model, self.device)
        self.loss_scale = HALF_PRECISION_LOSS_SCALE if self.dtype == torch.float16 else 1.0
        sampling = model.get_model_object("model_sampling")
        self.sigmas = None if self.prediction == FLOW else sampling.sigmas.detach().float().cpu().clone()
        self.identity = identity_of(model)
        self.parts = 1
        """In how many parts a batch goes through the network."""
        self._plan, self._room = _ROOMY, 0
        self._attachment: Attachment | None = None
        self._adapters: Adapters | None = None
        self._attached = ExitStack()
        self._adapting = False

    @property
    def context_width(self) -> int | None:
        """How wide the text is that the network takes; None when its configuration does not say."""
        return text_widths(self.patcher.model)[0]

    @property
    def pooled_width(self) -> int | None:
        """How wide the pooled text is that the network takes; None when its configuration does not say."""
        return text_widths(self.patcher.model)[1]

    @property
    def network(self) -> nn.Module:
        return self.patcher.model.diffusion_model

    @property
    def patchers(self) -> list:
        """What ComfyUI loads for a step: the model, and text encoders in training."""
        return [self.patcher, *([] if self._text is None else self._text.loaded)]

    def load(self) -> None:
        """Have ComfyUI load the MODEL with everything patched onto it, beside the room that the plan asks for."""
        patcher = self.patcher
        with telling_out_of_memory(), torch.inference_mode():
            mm.load_models_gpu(self.patchers, memory_required=self._room)
            # Where ComfyUI pages weights in and out by itself, room is all there is to ask for.
            if self._plan.resident < 1 and not is_dynamic(patcher):
                excess = patcher.loaded_size() - self._plan.resident * patcher.model_size()
                if excess > 0:
                    patcher.partially_unload(patcher.offload_device, excess)

    def prepare(self, adapters: Adapters, plan: MemoryPlan = _ROOMY, needs: Needs | None = None) -> None:
        """Load with the room that `plan` takes by `needs`, and prepare the adapted forwards.

        The adapters move to the device. Nothing about the network changes until `adapted()`.
        """
        if plan != self._plan:
            # What was allocated under another plan is in pieces of other sizes.
            give_back_memory()
        self._plan, self.parts = plan, plan.parts
        self._room = 0 if needs is None else needs.beside_weights(plan)
        self.load()
        self._adapters = adapters.to(self.device)
        self._attachment = Attachment(
            self.network,
            adapters,
            CastWeights(),
            blocks=self.family.blocks,
            recompute=plan.recompute,
            adds_in_place=self.family.adds_in_place,
            same_input=self.family.same_input,
        )
        if self._text is not None:
            self._text.attach(adapters, recompute=plan.recompute)

    def release(self) -> None:
        """Take weights, adapters and buffers off the device; `prepare()` brings them back.

        What else is made of the adapters, the optimizer and its state, is the caller's to let go of.
        """
        if self._adapters is not None:
            self._adapters.to(torch.device("cpu"))
        self._attachment = self._adapters = None
        if self._text is not None:
            self._text.release()
        others = [held for held in mm.current_loaded_models if not self.is_ours(held.model)]
        with torch.inference_mode():
            mm.free_memory(1e30, self.device, keep_loaded=others)
            mm.reset_cast_buffers()
        give_back_memory()

    def is_ours(self, patcher) -> bool:
        """Whether a patcher that ComfyUI holds, or None when it is gone, is one of these or a clone of one."""
        texts = [] if self._text is None else [self._text.patcher]
        return patcher is not None and any(own.is_clone(patcher) for own in [self.patcher, *texts])

    @contextmanager
    def adapted(self) -> Iterator[None]:
        """Autograd on, ComfyUI in training, adapters attached; all undone on any exit."""
        self._ensure_loaded()
        text = nullcontext() if self._text is None else self._text.adapted()
        with (
            telling_out_of_memory(),
            torch.inference_mode(False),
            torch.enable_grad(),
            _in_training(),
            self._attached,
            text,
        ):
            self._attach()
            self._adapting = True
            try:
                yield
            finally:
                self._adapting = False

    @contextmanager
    def base(self) -> Iterator[None]:
        """The network without its adapters and without autograd, also in the middle of an `adapted()` block."""
        self._ensure_loaded()
        self._attached.close()
        try:
            # In training as well, so that both answers come from the same kernels and differ by the adapters alone.
            with torch.inference_mode(False), torch.no_grad(), _in_training():
                yield
        finally:
            if self._adapting:
                self._attach()

    def _attach(self) -> None:
        self._attached.enter_context(trainable_around(self.network))
        self._attached.enter_context(self._attachment.attached())

    def text_of(self, batch: Batch) -> Sequence[dict[str, Tensor]]:
        """The encoded captions of a batch: from the cache, or where the text is trained, with gradients."""
        return batch.text if self._text is None else self._text.text_of(batch)

    def _ensure_loaded(self) -> None:
        """Another node, or a preview, may have put something else onto the shared weights."""
        if self.patcher.model.current_weight_patches_uuid != self.patcher.patches_uuid:
            self.load()

    def __call__(
        self, noisy: Tensor, sigma: Tensor, text: Sequence[dict[str, Tensor]], size: tuple[int, int]
    ) -> Tensor:
        """The raw answer of the network, before ComfyUI turns it into a clean picture."""
        frame = is_single_frame(self.patcher.model)
        noisy = noisy.unsqueeze(2) if frame else noisy
        base, guidance = self.patcher.model, self.family.guidance
        samples = [conditions_of(base, noisy, entry, size, guidance) for entry in text]
        answers, order = [], []
        for members, conditions in groups(samples):
            answers.append(self._forward(noisy[members], sigma[members], conditions))
            order += members
        answer = answers[0] if len(answers) == 1 else torch.cat(answers)[torch.tensor(order).argsort()]
        return answer.squeeze(2) if frame else answer

    def _forward(self, noisy: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        raw = answering_raw(self.patcher.model, self.patcher.get_model_object("model_sampling"), self.dtype)
        options = {
            **self.patcher.model_options.get("transformer_options", {}),
            "optimized_attention_override": _sdpa,
            # What ComfyUI's samplers tell the nodes that patch a MODEL: one prompt, and the noise levels.
            "cond_or_uncond": [0],
            "sigmas": sigma,
        }
        return raw._apply_model(noisy, sigma, transformer_options=options, **conditions)


@contextmanager
def _in_training() -> Iterator[None]:
    """Without this ComfyUI picks kernels that have no backward."""
    was_training = mm.in_training
    mm.in_training = True
    try:
        yield
    finally:
        mm.in_training = was_training


def _sdpa(_chosen, *args, **kwargs) -> Tensor:
    """PyTorch's attention in place of whatever was chosen at start: some of those have no backward, or a wrong one."""
    return attention_pytorch(*args, **kwargs)


def _compute_dtype(base, device: torch.device) -> torch.dtype:
    """The model's own inference dtype, but bfloat16 for float16 where the device has it: it needs no loss scale."""
    dtype = base.get_dtype_inference()
    if dtype == torch.float16 and mm.should_use_bf16(device):
        return torch.bfloat16
    return dtype
