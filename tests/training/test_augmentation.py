import pytest

from lora_workbench.training.augmentation import Augmentation


@pytest.mark.parametrize(("name", "value"), [("variants", 0), ("crop_jitter", 0.6), ("colour", float("nan"))])
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, but must be between"):
        Augmentation(**{name: value})


@pytest.mark.parametrize("difference", [{"crop_jitter": 0.1}, {"flip": True}, {"colour": 0.1}])
def test_a_difference_that_could_never_be_seen_is_refused(difference):
    with pytest.raises(ValueError, match="variants is 1, which is the plain picture alone: set it to 2 or more"):
        Augmentation(**difference)
