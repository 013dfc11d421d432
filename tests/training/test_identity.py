"""Settings without effect make no other training, and those with one do: both shown by training."""

from contextlib import closing
from dataclasses import asdict, replace

import pytest
from toys import Batches, Denoiser, equal, part

from lora_workbench.training.config import LoraConfig, ObjectiveConfig, TextConfig, TrainConfig
from lora_workbench.training.differences import differences
from lora_workbench.training.identity import MASKED, effective
from lora_workbench.training.loop import train
from lora_workbench.training.lora import Adapters
from lora_workbench.training.run import TrainingRun

IDLE = [
    ({}, {"huber_c": 0.5}),
    ({}, {"huber_schedule": "constant"}),
    ({}, {"multires_discount": 0.8}),
    ({"timesteps": "logit-normal"}, {"timestep_shift": 5.0}),
    ({"timesteps": "shift"}, {"timestep_mean": 1.0}),
    ({"timesteps": "uniform"}, {"timestep_std": 0.5}),
    ({}, {"class_words": "woman"}),
    ({}, {"restarts": 3}),
    ({"kind": "oft"}, {"rank_stabilized": True}),
    ({}, {"lokr_factor": 4}),
    ({}, {"mask_floor": 0.5}),
    ({}, {"mask_preservation": 1.0}),
]
AT_WORK = [
    ({"loss": "huber"}, {"huber_c": 0.5}),
    ({"loss": "smooth l1"}, {"huber_schedule": "constant"}),
    ({"multires_iterations": 4}, {"multires_discount": 0.8}),
    ({"timesteps": "shift"}, {"timestep_shift": 5.0}),
    ({"timesteps": "logit-normal"}, {"timestep_mean": 1.0}),
    ({"timesteps": "logit-normal"}, {"timestep_std": 0.5}),
    ({"schedule": "cosine with restarts"}, {"restarts": 3}),
    ({}, {"rank_stabilized": True}),
    ({"kind": "lokr"}, {"lokr_factor": 4}),
]


def configured(config, settings):
    return replace(config, **{name: value for name, value in settings.items() if hasattr(config, name)})


def configurations(settings):
    objective = configured(ObjectiveConfig(), settings)
    return configured(LoraConfig(rank=4), settings), configured(TrainConfig(steps=4, objective=objective), settings)


def identity(settings, masked=False):
    lora, config = configurations(settings)
    return {"model": "abc", MASKED: masked, "lora": asdict(lora), "train": config.identity()}


def same(one, other) -> bool:
    first, second = effective(one, other)
    return first == second


def trained(settings):
    lora, config = configurations(settings)
    denoiser = Denoiser()
    adapters = Adapters.build([part(denoiser.network)], lora, seed=0)
    denoiser.attach(adapters, checkpointing=False)
    with closing(train(denoiser, Batches(), adapters, config)) as steps:
        *_, last = steps
    return last.snapshot().weights


@pytest.mark.parametrize(("settings", "change"), IDLE, ids=str)
def test_a_setting_without_effect_makes_no_other_training(settings, change):
    assert equal(trained(settings), trained(settings | change))
    one, other = identity(settings), identity(settings | change)
    assert one != other and same(one, other) and differences(one, other) == []


@pytest.mark.parametrize(("settings", "change"), AT_WORK, ids=str)
def test_the_same_setting_makes_another_training_where_it_has_an_effect(settings, change):
    assert not equal(trained(settings), trained(settings | change))
    one, other = identity(settings), identity(settings | change)
    assert not same(one, other) and differences(one, other) == list(change)


def test_text_settings_count_where_something_of_the_text_is_trained():
    def of(**text):
        return {"train": TrainConfig(text=TextConfig(**text)).identity()}

    assert same(of(), of(encoder_stop=0.5)) and same(of(), of(token_rate=3.0))
    assert not same(of(encoder_rate=0.5), of(encoder_rate=0.5, encoder_stop=0.0))
    assert not same(of(new_tokens=2), of(new_tokens=2, token_rate=3.0))


@pytest.mark.parametrize("changed", [{"mask_floor": 0.5}, {"mask_preservation": 1.0}], ids=str)
def test_what_masks_leave_out_counts_where_there_are_masks_which_earlier_versions_did_not_say(changed):
    def of(version, **settings):
        return {
            name: value
            for name, value in identity(settings, masked=version == "masks").items()
            if version or name != MASKED
        }

    assert not same(of("masks"), of("masks", **changed)) and not same(of(""), of("", **changed))
    assert same(of("", **changed), of("no masks")) and same(of("no masks"), of("", **changed))
    assert same(of(""), of("masks")) and not same(of("", **changed), of("masks"))


def test_a_run_is_gone_on_with_whatever_idle_settings_it_was_stored_with(tmp_path):
    def opened(**settings):
        return TrainingRun.open(tmp_path / "runs", tmp_path / "loras", "star", identity(settings))

    stored = opened(huber_c=0.5, restarts=7)
    stored.remember(step=0)
    (tmp_path / "loras" / "star").mkdir(parents=True)
    assert opened().name == opened(class_words="woman").name == "star"
    assert opened(loss="huber").name == "star_v2"


@pytest.mark.parametrize("factor", [0, -1])
def test_a_lokr_of_an_earlier_version_does_not_go_on_since_its_states_lie_in_another_order(factor):
    before, now = identity({"kind": "lokr"}), identity({"kind": "lokr", "lokr_factor": factor})
    del before["lora"]["lokr_factor"]
    assert not same(before, now)
    assert differences(before, now) == ["lokr_factor"]


def test_a_masked_run_of_an_earlier_version_goes_on_unless_the_base_is_asked_now():
    before = identity({}, masked=True)
    del before["train"]["objective"]["mask_preservation"]
    assert same(before, identity({}, masked=True))
    assert differences(before, identity({"mask_preservation": 1.0}, masked=True)) == ["mask_preservation"]


def test_other_kinds_of_an_earlier_version_go_on():
    before = identity({"kind": "loha"})
    del before["lora"]["lokr_factor"]
    assert same(before, identity({"kind": "loha"}))
