"""What a LoRA file says about itself: to other tools in their words, and to us all it takes to train it again.

`ss_*` are kohya's words, `modelspec.*` those of the model metadata specification 1.0.1, `lora_workbench.*` our own.
No times anywhere, so equal runs give equal files.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError, safe_open

from .config import DORA, LOHA, LOKR, LORA, OFT, LoraConfig, ObjectiveConfig, TrainConfig
from .families import Family
from .schedule import warmup_steps
from .whole_file import payload_of, with_entries, write_atomically

OURS = "lora_workbench."
STRENGTH = f"{OURS}strength"
"""The strength that did best on pictures kept out of training."""
MOST_RECOMMENDED = 2.0
"""What a file may recommend: anybody may have written it."""
VERSION = "0.1.0"
COVERS, THUMBNAIL = "ssmd_cover_images", "modelspec.thumbnail"
COVER_SIZE = 384
LYCORIS = {DORA: "lora", LOHA: "loha", LOKR: "lokr", OFT: "diag-oft"}
"""LyCORIS' name for each kind that kohya's own network module does not have."""
MODULES = {"flux": "networks.lora_flux", "sd3": "networks.lora_sd3"}
OPTIMIZERS = {
    "adamw": "torch.optim.adamw.AdamW",
    "adamw 8-bit": "bitsandbytes.optim.adamw.AdamW8bit",
    "adafactor": "transformers.optimization.Adafactor",
    "prodigy": "prodigyopt.prodigy.Prodigy",
    "lion": "lion_pytorch.lion_pytorch.Lion",
    "schedule-free": "schedulefree.adamw_schedulefree.AdamWScheduleFree",
}
IMPLEMENTATIONS = {
    "sdxl": "https://github.com/Stability-AI/generative-models",
    "flux": "https://github.com/black-forest-labs/flux",
}
PREDICTIONS = {"eps": "epsilon", "v": "v"}
TIMESTEPS = {"uniform": "uniform", "logit-normal": "sigmoid", "shift": "shift", "resolution shift": "flux_shift"}
SENTENCE_WORDS = frozenset(
    ("a", "an", "the", "this", "that", "and", "or", "but", "while", "with", "without", "in", "on", "at", "of", "by")
    + ("for", "from", "to", "into", "over", "under", "near", "behind", "beside", "between", "against", "through")
)
"""No tag starts with one of these."""


def description(
    *,
    title: str,
    family: Family,
    prediction: str,
    lora: LoraConfig,
    config: TrainConfig,
    triggers: Mapping[str, int],
    resolution: int,
    captions: Sequence[str],
    step: int,
    regularization: int = 0,
    held_out: int = 0,
    average: str = "",
    settings: Mapping[str, object] | None = None,
    dataset: str = "",
    base_model: str = "",
    workflow: Mapping[str, object] | None = None,
    node: str = "",
) -> dict[str, str]:
    """The metadata of a LoRA file. `triggers` says how many pictures each trigger word calls.

    `settings` are more of the run's settings than the two configs hold, `dataset` and `base_model` are fingerprints,
    `workflow` is the graph in API form that trains it and `node` the Trainer's id in it.
    """
    kept = {"lora": asdict(lora), "train": asdict(config), **(settings or {})}
    entries = {
        **_kohya(title, family, prediction, lora, config, step),
        **_pictures(title, triggers, resolution, captions, regularization, held_out),
        **_model_spec(title, family, prediction, config.objective, triggers, resolution),
        f"{OURS}step": str(step),
        f"{OURS}settings": json.dumps(kept, sort_keys=True, ensure_ascii=False),
    }
    told = {"average": average, "version": VERSION, "dataset": dataset, "base_model": base_model, "node": node}
    told["workflow"] = json.dumps(workflow, sort_keys=True, ensure_ascii=False) if workflow else ""
    return entries | {OURS + name: value for name, value in told.items() if value}


def _kohya(
    title: str, family: Family, prediction: str, lora: LoraConfig, config: TrainConfig, step: int
) -> dict[str, str]:
    module, arguments = network(lora, family)
    entries = {
        "ss_output_name": title,
        "ss_base_model_version": family.base_model_version,
        "ss_network_module": module,
        "ss_network_dim": str(lora.rank),
        "ss_network_alpha": str(float(lora.alpha) if lora.kind == OFT else lora.alpha_for(lora.rank)),
        "ss_network_args": json.dumps(arguments),
        "ss_learning_rate": str(config.learning_rate),
        "ss_unet_lr": str(config.learning_rate),
        "ss_lr_scheduler": config.schedule.replace(" ", "_"),
        "ss_lr_warmup_steps": str(warmup_steps(config.warmup, config.steps)),
        "ss_optimizer": f"{OPTIMIZERS[config.optimizer]}(weight_decay={config.weight_decay})",
        "ss_batch_size_per_device": str(config.batch_size),
        "ss_total_batch_size": str(config.batch_size * config.accumulation),
        "ss_gradient_accumulation_steps": str(config.accumulation),
        "ss_max_grad_norm": str(config.clip_norm),
        "ss_max_train_steps": str(config.steps),
        "ss_steps": str(step),
        "ss_seed": str(config.seed),
        "ss_v2": "False",
    }
    if lora.dropout:
        entries["ss_network_dropout"] = str(lora.dropout)
    if lora.max_norm:
        entries["ss_scale_weight_norms"] = str(lora.max_norm)
    if config.text.encoder_rate:
        entries["ss_text_encoder_lr"] = str(config.learning_rate * config.text.encoder_rate)
    return entries | _objective(config.objective, prediction, family)


def _objective(objective: ObjectiveConfig, prediction: str, family: Family) -> dict[str, str]:
    entries = {"ss_loss_type": objective.loss.replace(" ", "_")}
    if objective.loss != "l2":
        entries |= {"ss_huber_c": str(objective.huber_c), "ss_huber_schedule": objective.huber_schedule}
    if objective.min_snr_gamma:
        entries["ss_min_snr_gamma"] = str(objective.min_snr_gamma)
    if objective.debiased:
        entries["ss_debiased_estimation"] = "True"
    if objective.noise_offset:
        entries["ss_noise_offset"] = str(objective.noise_offset)
    if objective.multires_iterations:
        entries["ss_multires_noise_iterations"] = str(objective.multires_iterations)
        entries["ss_multires_noise_discount"] = str(objective.multires_discount)
    if objective.input_perturbation:
        entries["ss_ip_noise_gamma"] = str(objective.input_perturbation)
    if prediction == "flow":
        entries["ss_model_prediction_type"] = "raw"
        if objective.timesteps in TIMESTEPS:
            entries["ss_timestep_sampling"] = TIMESTEPS[objective.timesteps]
        if objective.timesteps == "shift":
            entries["ss_discrete_flow_shift"] = str(objective.timestep_shift)
        if family.guidance is not None:
            entries["ss_guidance_scale"] = str(family.guidance)
    return entries


def _pictures(
    title: str,
    triggers: Mapping[str, int],
    resolution: int,
    captions: Sequence[str],
    regularization: int,
    held_out: int,
) -> dict[str, str]:
    return {
        "ss_num_train_images": str(len(captions)),
        "ss_num_reg_images": str(regularization),
        "ss_num_validation_images": str(held_out),
        "ss_resolution": f"({resolution}, {resolution})",
        "ss_tag_frequency": json.dumps({title: tag_frequency(captions, triggers)}, ensure_ascii=False),
    }


def _model_spec(
    title: str,
    family: Family,
    prediction: str,
    objective: ObjectiveConfig,
    triggers: Mapping[str, int],
    resolution: int,
) -> dict[str, str]:
    entries = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": family.architecture,
        "modelspec.implementation": IMPLEMENTATIONS.get(family.name, "https://github.com/comfyanonymous/ComfyUI"),
        "modelspec.title": title,
        "modelspec.resolution": f"{resolution}x{resolution}",
    }
    if prediction in PREDICTIONS:
        entries["modelspec.prediction_type"] = PREDICTIONS[prediction]
    if triggers:
        entries["modelspec.trigger_phrase"] = ", ".join(triggers)
    low, high = objective.timestep_low, objective.timestep_high
    if (low, high) != (0.0, 1.0):
        entries["modelspec.timestep_range"] = f"{round(1000 * low)},{round(1000 * high)}"
    return entries


def network(lora: LoraConfig, family: Family) -> tuple[str, dict[str, str]]:
    """The module of kohya's scripts or of LyCORIS that makes such adapters, and its arguments; values are text."""
    arguments = {"layers": lora.layers}
    if lora.conv_rank:
        arguments |= {"conv_dim": str(lora.conv_rank), "conv_alpha": str(lora.alpha_for(lora.conv_rank))}
    if lora.kind == LORA:
        return MODULES.get(family.name, "networks.lora"), arguments
    arguments["algo"] = LYCORIS[lora.kind]
    if lora.kind == DORA:
        arguments["dora_wd"] = "True"
    if lora.kind == LOKR:
        arguments |= {"factor": str(lora.lokr_factor)} if lora.lokr_factor else {"full_matrix": "True"}
    return "lycoris.kohya", arguments


def tag_frequency(captions: Sequence[str], triggers: Mapping[str, int]) -> dict[str, int]:
    """Trigger words and tags, with how many pictures each is said of. Sentences are the user's own and stay out."""
    counts = dict(triggers)
    for caption in captions:
        parts = dict.fromkeys(part.strip() for part in caption.split(","))
        tags = [part for part in parts if part and part not in triggers]
        if all(map(_is_tag, tags)):
            for tag in tags:
                counts[tag] = counts.get(tag, 0) + 1
    return counts


def _is_tag(part: str) -> bool:
    """Whether a part of a caption can be a tag of a list; one part that cannot makes the caption a sentence."""
    words = part.lower().split()
    return len(words) <= 3 and not part.endswith(".") and words[0] not in SENTENCE_WORDS


def hashes(data: bytes) -> dict[str, str]:
    """The SHA-256 of a file's tensors under the names other tools use for it; the metadata does not change it."""
    digest = hashlib.sha256(payload_of(data)).hexdigest()
    return {"sshs_model_hash": digest, "modelspec.hash_sha256": f"0x{digest}"}


def read(path: Path) -> dict[str, str]:
    """What a file says about itself; {} when it says nothing, ValueError naming a file that cannot be read."""
    try:
        with safe_open(str(path), framework="pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(f"The LoRA file '{path.name}' cannot be read ({error}): choose another file.") from error


def trigger_words(entries: Mapping[str, str]) -> list[str]:
    """What a file says calls it: its trigger phrase, else the commonest of its training tags."""
    phrase = entries.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return [phrase]
    try:
        folders_of_tags = json.loads(entries.get("ss_tag_frequency", "{}"))
        counts = [item for tags in folders_of_tags.values() for item in tags.items()]
        return [max(counts, key=lambda item: item[1])[0].strip()] if counts else []
    except (ValueError, AttributeError, TypeError, RecursionError):
        return []


def recommended(entries: Mapping[str, str]) -> float | None:
    """The strength that a file recommends for itself, if any; one that no LoRA can be meant for is none."""
    try:
        strength = float(entries[STRENGTH])
    except (KeyError, ValueError):
        return None
    return strength if 0 < strength <= MOST_RECOMMENDED else None


def settings_of(entries: Mapping[str, str]) -> dict:
    """The settings a file was trained with; {} when it is not one of ours."""
    try:
        settings = json.loads(entries.get(f"{OURS}settings", "{}"))
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def amend(path: Path, **changes: str) -> None:
    """Change what a file says about itself, for example `strength`, leaving its tensors and its time as they are."""
    data, entries, before = path.read_bytes(), read(path), path.stat()
    write_atomically(path, with_entries(data, {**entries, **{OURS + name: value for name, value in changes.items()}}))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def is_ours(path: Path) -> bool:
    """Whether a LoRA file was written by this pack, so that more may be written into it."""
    return path.suffix == ".safetensors" and any(name.startswith(OURS) for name in read(path))


def add_cover(path: Path, picture: Image.Image) -> bool:
    """Put a picture into the file where ComfyUI and others look for its cover; False when it has one already."""
    entries = read(path)
    if COVERS in entries:
        return False
    cover = base64.b64encode(_jpeg(picture)).decode()
    entries |= {COVERS: json.dumps([cover]), THUMBNAIL: f"data:image/jpeg;base64,{cover}"}
    write_atomically(path, with_entries(path.read_bytes(), entries))
    return True


def _jpeg(picture: Image.Image) -> bytes:
    small = picture.convert("RGB")
    small.thumbnail((COVER_SIZE, COVER_SIZE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()
