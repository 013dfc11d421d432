"""Which pictures are held out: as many as the table says, none with a twin in training, spread over the shapes."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from lora_workbench.training.dataset import REGULARIZATION, Dataset, Example
from lora_workbench.training.split import hold_out_count, split, split_again

SHAPES = {"square": (512, 512), "wide": (768, 512), "tall": (512, 768)}


def examples(count, shape="square"):
    return [Example(Path(f"/set/{shape}_{number}.png"), "x", *SHAPES[shape]) for number in range(count)]


def names(chosen):
    return [example.path.name for example in chosen]


@pytest.mark.parametrize(
    ("count", "held"),
    [(1, 0), (9, 0), (10, 2), (19, 2), (20, 4), (39, 4), (40, 4), (50, 5), (79, 7), (80, 8), (1000, 8)],
)
def test_as_many_are_held_out_as_the_table_says(count, held):
    assert hold_out_count(count) == held


def test_a_wish_that_leaves_nothing_to_train_on_is_refused():
    assert hold_out_count(5, 4) == 4 and hold_out_count(5, 0) == 0
    for wanted in (5, -1):
        with pytest.raises(ValueError, match="between 0 and 4"):
            hold_out_count(5, wanted)


def test_nothing_is_lost_and_the_order_stays():
    pictures = examples(12) + examples(9, "wide")
    train, held = split(pictures, 4)
    assert len(held) == 4 and sorted(names(train + held)) == sorted(names(pictures))
    assert names(train) == [name for name in names(pictures) if name not in names(held)]


def test_new_files_rarely_change_the_choice():
    before, after = (set(names(split(examples(count), 4)[1])) for count in (30, 33))
    assert len(before & after) >= 3


def test_every_shape_gives_its_share():
    pictures = examples(20) + examples(10, "wide") + examples(2, "tall")
    shapes = Counter(name.split("_")[0] for name in names(split(pictures, 6)[1]))
    assert shapes == {"square": 4, "wide": 2}


def test_pictures_with_a_near_duplicate_are_held_out_last():
    pictures = examples(12)
    unsplit = split(pictures, 4)[1]
    clusters = [(unsplit[0].path, pictures[0].path), (unsplit[1].path, unsplit[2].path)]
    twins = {path for cluster in clusters for path in cluster}
    assert not twins & {example.path for example in split(pictures, 4, clusters)[1]}


def test_of_each_cluster_one_at_most_is_held_out():
    pictures = examples(6)
    paths = [example.path for example in pictures]
    held = {example.path for example in split(pictures, 4, [paths[:3], paths[3:5]])[1]}
    assert paths[5] in held and len(held & set(paths[:3])) == 1 and len(held & set(paths[3:5])) == 1


def test_splitting_again_knows_the_twins_and_keeps_the_rest():
    train, held = split(examples(20), 4)
    regularization = replace(examples(1, "wide")[0], role=REGULARIZATION)
    dataset = Dataset(Path("/set"), (*train, regularization), held)
    again = split_again(dataset, [(held[0].path, train[0].path)])
    assert set(names(held[1:])) < set(names(again.held_out)) and len(again.held_out) == 4
    assert held[0] in again.examples and regularization in again.examples
    assert split_again(again, [(held[0].path, train[0].path)]) == again
