"""What a LoRA file says about itself, in the words of the many programs that write such files, put into ours."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from datetime import datetime, timezone

from ..training.description import OURS, STRENGTH, trigger_words

LONGEST = 120
"""Characters of a value that are shown."""
MOST_TAGS, MOST_FOLDERS = 12, 8
PICTURES = ("ssmd_cover_images", "modelspec.thumbnail")
HIDDEN = ("ss_tag_frequency", "ss_dataset_dirs", "ss_bucket_info", "ss_session_id")
"""What is told in other words, or says nothing to anybody."""

FACTS = (
    ("title", "modelspec.title", "ss_output_name", "name"),
    ("base model", "ss_base_model_version", "modelspec.architecture", "ot_config:model_type"),
    ("trained on", "ss_sd_model_name", "ot_config:base_model_name", "base_model"),
    ("recommended strength", STRENGTH),
    ("steps", f"{OURS}step", "ss_steps", "training_info:step", "ss_max_train_steps"),
    ("epochs", "ss_epoch", "training_info:epoch", "ot_config:epochs"),
    ("pictures", "ss_num_train_images"),
    ("regularization pictures", "ss_num_reg_images"),
    ("resolution", "ss_resolution", "modelspec.resolution", "ot_config:resolution"),
    ("rank", "ss_network_dim", "ot_config:lora_rank", "lora_adapter_metadata:r"),
    ("alpha", "ss_network_alpha", "ot_config:lora_alpha", "lora_adapter_metadata:lora_alpha"),
    ("network", "ss_network_module", "ot_config:peft_type"),
    ("network settings", "ss_network_args"),
    ("dropout", "ss_network_dropout", "ot_config:dropout_probability", "lora_adapter_metadata:lora_dropout"),
    ("learning rate", "ss_learning_rate", "ss_unet_lr", "ot_config:learning_rate"),
    ("learning rate of text encoders", "ss_text_encoder_lr", "ot_config:text_encoder:learning_rate"),
    ("schedule", "ss_lr_scheduler", "ot_config:learning_rate_scheduler"),
    ("optimizer", "ss_optimizer", "ot_config:optimizer:optimizer"),
    ("batch", "ss_total_batch_size", "ss_batch_size_per_device", "ot_config:batch_size"),
    ("precision in training", "ss_mixed_precision", "ot_config:train_dtype"),
    ("clip skip", "ss_clip_skip"),
    ("noise offset", "ss_noise_offset"),
    ("min SNR gamma", "ss_min_snr_gamma"),
    ("seed", "ss_seed"),
    ("author", "modelspec.author"),
    ("license", "modelspec.license"),
    ("made of", "modelspec.merged_from"),
    ("comment", "ss_training_comment", "modelspec.description"),
    ("how to use it", "modelspec.usage_hint"),
    ("tags", "modelspec.tags"),
)
"""What it is called here, and where it stands; `key:name` is a name within an entry that is JSON."""
EMPTY = ("", "None", "null", "[]", "{}")


def maker(entries: Mapping[str, str]) -> str:
    """The program that made a file; "" when nothing says so."""
    module = entries.get("ss_network_module", "")
    software = _within(entries, "software:name")
    version = _within(entries, "software:version")
    if any(key.startswith(OURS) for key in entries):
        return " ".join(filter(None, ("LoRA Workbench", entries.get(f"{OURS}version", ""))))
    if software:
        return " ".join(filter(None, (software, version)))
    if any(key.startswith("ot_") for key in entries):
        return "OneTrainer"
    if module.startswith("lycoris"):
        return "kohya's scripts with LyCORIS"
    if module.startswith("networks."):
        return "kohya's scripts"
    return "diffusers or another program with peft" if "lora_adapter_metadata" in entries else ""


def facts(entries: Mapping[str, str]) -> dict[str, str]:
    """What is known of the making, by what it is called here; only what is said."""
    found = {"made by": maker(entries), "trigger words": ", ".join(trigger_words(entries))}
    for label, *places in FACTS:
        said = (_within(entries, place) for place in places)
        found[label] = next((text for text in said if text not in EMPTY), "")
    found["trained at"] = _date(entries.get("ss_training_finished_at") or entries.get("modelspec.date", ""))
    return {label: shortened(text) for label, text in found.items() if text}


def folders(entries: Mapping[str, str]) -> list[str]:
    """The folders of pictures that kohya's scripts name, with how many there are and how often each is repeated."""
    table = _json(entries.get("ss_dataset_dirs", ""))
    lines = []
    for name, about in list(table.items())[:MOST_FOLDERS] if isinstance(table, dict) else ():
        if isinstance(about, dict):
            lines.append(f"{name}: {about.get('img_count', '?')} pictures, {about.get('n_repeats', '?')} repeats")
    return [shortened(line) for line in lines]


def tags(entries: Mapping[str, str]) -> list[tuple[str, int]]:
    """The commonest tags of the captions, with how often each was said."""
    counts: Counter[str] = Counter()
    table = _json(entries.get("ss_tag_frequency", ""))
    for own in table.values() if isinstance(table, dict) else ():
        for tag, count in own.items() if isinstance(own, dict) else ():
            if type(count) is int:
                counts[tag.strip()] += count
    return [(shortened(tag), count) for tag, count in counts.most_common(MOST_TAGS)]


def others(entries: Mapping[str, str]) -> dict[str, str]:
    """All other entries, shortened."""
    told = {place.partition(":")[0] for _, *places in FACTS for place in places if ":" not in place} | set(HIDDEN)
    return {
        shortened(key): _value(key, value)
        for key, value in sorted(entries.items())
        if key not in told and value not in EMPTY
    }


def said_rank(entries: Mapping[str, str]) -> int | None:
    """The rank a file says it has; None when it says none."""
    text = facts(entries).get("rank", "")
    return int(text) if text.isdecimal() and len(text) < 6 else None


def shortened(text: str) -> str:
    """On one line, without what cannot be shown, and no longer than fits."""
    line = "".join(letter if letter.isprintable() else " " for letter in text[: 4 * LONGEST])
    line = " ".join(line.split())
    return line if len(line) <= LONGEST and len(text) <= 4 * LONGEST else f"{line[: LONGEST - 1]}…"


def _value(key: str, value: str) -> str:
    if key in PICTURES or value.startswith("data:image"):
        return f"a picture ({len(value):,} characters)"
    table = _json(value) if value[:1] in "{[" else None
    if isinstance(table, (dict, list)) and len(value) > LONGEST:
        return f"{len(table)} entries ({len(value):,} characters)"
    return shortened(value)


def _within(entries: Mapping[str, str], place: str) -> str:
    """An entry, or what stands under names within one that is JSON."""
    key, *names = place.split(":")
    if not names:
        return entries.get(key, "")
    value = _json(entries.get(key, ""))
    for name in names:
        value = value.get(name, _of_network(value, name)) if isinstance(value, dict) else None
    return "" if value is None or isinstance(value, (dict, list)) else str(value)


def _of_network(table: dict, name: str) -> object:
    """diffusers writes `transformer.r` where peft writes `r`."""
    return next((value for key, value in table.items() if key.endswith(f".{name}")), None)


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _date(text: str) -> str:
    """A time in seconds as a date; a date as it is."""
    try:
        return datetime.fromtimestamp(float(text), timezone.utc).strftime("%Y-%m-%d")
    except (ValueError, OverflowError, OSError):
        return text
