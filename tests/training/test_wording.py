import pytest

from lora_workbench.training.wording import Wording


@pytest.mark.parametrize(
    ("name", "value"),
    [("keep_first", -1), ("tag_dropout", 1.1), ("caption_dropout", -0.1), ("caption_dropout", float("nan"))]
    + [("most_texts", 0)],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=f"{name} is {value}, but must be between"):
        Wording(**{name: value})
