"""New words: how captions say them, what they begin as, and under what names they are kept."""

from pathlib import Path

import pytest
import torch

from lora_workbench.training.dataset import Example
from lora_workbench.training.embeddings import (
    MOST_DECAY,
    bundled,
    embedding_names,
    embedding_path,
    first_rows,
    new_words,
    rows_of,
    trained_form,
    worded,
)


def example(trigger, class_words=""):
    return Example(Path("a.png"), "", 8, 8, trigger_word=trigger, class_words=class_words)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("zork", "embedding:run/a"),
        ("a photo of zork on a beach", "a photo of embedding:run/a on a beach"),
        ("zork, blue", "embedding:run/a , blue"),
        ("Zork's hat (zork:1.2)", "embedding:run/a 's hat ( embedding:run/a :1.2)"),
        ("zorks and bezork are others", "zorks and bezork are others"),
        ("", ""),
    ],
)
def test_a_prompt_says_the_embedding_where_it_said_the_trigger_word(text, said):
    assert worded(text, {"zork": "run/a"}) == said


def test_the_longest_of_several_trigger_words_is_meant():
    names = {"zork": "z", "zork hat": "zh"}
    assert worded("a zork hat and a zork", names) == "a embedding:zh and a embedding:z"
    assert worded("a zork hat", {}) == "a zork hat"


@pytest.mark.parametrize(
    ("lora", "triggers", "names"),
    [
        ("my run/my run_000100.safetensors", ["zork"], ["my_run/my_run_000100"]),
        ("a\\b (2).safetensors", ["zork", "x y"], ["a/b_2_zork", "a/b_2_x_y"]),
        ("v1.5.safetensors", ["zork"], ["v1.5"]),
    ],
)
def test_an_embedding_is_called_like_its_lora_without_what_ends_a_name_in_a_prompt(lora, triggers, names):
    assert list(embedding_names(triggers, lora).values()) == names
    assert all(not set(name) & set(" ()[]<>:") for name in names)


@pytest.mark.parametrize("triggers", [["zork!", "zork?", "Zork", "moon"], ["moon", "Zork", "zork?", "zork!"]])
def test_words_that_differ_in_symbols_or_case_alone_have_files_of_their_own(triggers):
    """Also where a disk does not tell case apart, and in whatever order a file or a dataset says the words."""
    names = embedding_names(triggers, "star.safetensors")
    assert names == {"Zork": "star_Zork", "zork!": "star_zork-2", "zork?": "star_zork-3", "moon": "star_moon"}


def test_an_embedding_lies_in_the_folder_that_its_name_says(tmp_path):
    assert embedding_path(tmp_path, "run/a_1") == tmp_path / "run" / "a_1.safetensors"


def test_the_words_are_the_trigger_words_with_what_they_are():
    examples = [example("zork"), example("zork", "Zork star"), example("blib", "blib"), example("")]
    assert new_words(examples) == {"zork": "star", "blib": ""}


def test_new_tokens_without_a_trigger_word_are_refused_in_one_sentence():
    with pytest.raises(ValueError, match=r"this dataset has none: give .* a trigger_word, or set new_tokens to 0\.$"):
        new_words([example(""), example(" ")])


def test_a_new_word_begins_as_its_class_said_as_often_as_it_takes():
    known = torch.randn(2, 5)
    assert torch.equal(first_rows(known, None, None, 5, None), known[[0, 1, 0, 1, 0]])


def test_a_new_word_without_class_begins_like_a_row_of_the_table():
    table = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0)) * 0.3 + 0.1
    mean, deviation = table.mean(0), table.std(0)
    drawn = [first_rows(None, mean, deviation, 64, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert drawn[0].norm(dim=1).mean().item() == pytest.approx(table.norm(dim=1).mean().item(), rel=0.05)
    assert (drawn[0].mean(0) - mean).abs().max() < 4 * 0.3 / 64**0.5


@pytest.mark.parametrize("size", [1e-3, 1.0, 50.0])
def test_every_table_is_trained_at_one_size_and_rows_stay_as_long_as_they_began(size):
    rows = torch.randn(3, 48, generator=torch.Generator().manual_seed(0)) * size
    trained, lengths = trained_form(rows)
    torch.testing.assert_close(rows_of(trained, lengths), rows, rtol=1e-6, atol=0)
    torch.testing.assert_close(trained.square().mean(1).sqrt(), torch.full((3,), 1 / 64))
    moved = rows_of(trained + torch.randn(3, 48), lengths)
    torch.testing.assert_close(moved.norm(dim=1), rows.norm(dim=1))


def test_the_gradient_turns_a_row_and_does_not_lengthen_it():
    rows = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    trained, lengths = (tensor.double() for tensor in trained_form(rows))
    trained.requires_grad_()
    rows_of(trained, lengths)[:, 0].sum().backward()
    assert trained.grad.abs().max() > 0.1
    assert (trained.grad * trained).sum(1).abs().max() < 1e-5


@pytest.mark.parametrize(("decay", "keeps"), [(MOST_DECAY, True), (4.0, False)])
def test_what_is_trained_of_a_row_keeps_its_size_under_the_most_weight_decay_and_not_under_more(decay, keeps):
    """Half as long, it turns twice as far in a step."""
    random = torch.Generator().manual_seed(0)
    first, lengths = trained_form(torch.randn(1, 768, generator=random))
    trained = torch.nn.Parameter(first.clone())
    optimizer = torch.optim.AdamW([trained], lr=1e-4, weight_decay=decay)
    for _ in range(2000):
        (rows_of(trained, lengths) * torch.randn(1, 768, generator=random)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (trained.norm() > 0.95 * first.norm()) == keeps and (trained.norm() < 0.55 * first.norm()) != keeps


def test_a_lora_file_holds_its_embeddings_in_onetrainers_words():
    rows = {"zork": {"clip_l": torch.ones(2, 3), "clip_g": torch.zeros(2, 5)}}
    assert {key: tuple(rows.shape) for key, rows in bundled(rows).items()} == {
        "bundle_emb.zork.clip_l": (2, 3),
        "bundle_emb.zork.clip_g": (2, 5),
    }
