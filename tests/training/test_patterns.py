"""Patterns that somebody else may have written: what a search for them costs is known before they are searched for."""

import time

import pytest

from lora_workbench.training.patterns import MOST_WAYS, overrides, patterns

NAME = "diffusion_model.input_blocks.8.1.transformer_blocks.9.attn2.to_out.0.weight"


@pytest.mark.parametrize(
    "pattern",
    [
        ".*attn.*",
        r".*(attn|ff).*(to_q|to_k|to_v).*",
        r"double_blocks\.\d+\..*attn.*qkv",
        r".*double_blocks\.(7|12|16|20)\..*proj.*",
        r"transformer_blocks\.\d{1,2}\.attn[12]\.to_[qkv]",
        "(img_|txt_)?attn",
        "[0-9]+_to_(q|k)$",
    ],
)
def test_what_people_write_is_let_in(pattern):
    assert [found.pattern for found in patterns(pattern, "include")] == [pattern]


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        r"(\w+\.?)+X",
        "(attn|a.tn)*!",
        ".*.*.*[^a]",
        "((.*))((.*))((.*))!",
        ".?" * 30 + "!",
        "(a?){40}!",
        "(?x)(a+) *!",
        "(?:a+(?#no))*!",
        r"(.*)\1*\1*\1*!",
        "(ab|.b|b)" * 20,
    ],
)
def test_what_would_hang_is_refused_with_a_sentence(pattern):
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r"^include has the pattern '.*', which could take minutes to look for: .*\.$"):
        patterns(pattern, "include")
    assert time.perf_counter() - began < 1


def test_many_slow_patterns_are_as_bad_as_one():
    slow = ".*.*[^a] = 1"
    assert len(overrides(slow, "blocks", 100.0)) == 1
    with pytest.raises(ValueError, match="which could take minutes"):
        overrides("\n".join([slow] * (MOST_WAYS // 1000)), "blocks", 100.0)


@pytest.mark.parametrize("pattern", [".*.*[^a][^b]!", ".*.*.?!", r"\w*\w*[!]", ".*(a|.)(t|.)(n|.).*[!]"])
def test_the_slowest_that_are_let_in_look_through_a_whole_model_in_seconds(pattern):
    (found,) = patterns(pattern, "include")
    began = time.perf_counter()
    assert not any(found.search(NAME) for _ in range(26))
    assert time.perf_counter() - began < 0.6  # a hundredth of SDXL's 2,600 weights


@pytest.mark.parametrize("pattern", ["(", "*attn*", "a" * 501, "(" * 400 + ")" * 400])
def test_what_is_no_pattern_is_named(pattern):
    with pytest.raises(ValueError, match=r"^include has the pattern '.{1,500}', which is no regular expression \("):
        patterns(pattern, "include")
