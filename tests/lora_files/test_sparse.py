"""TIES and DARE, entry by entry as their papers have them."""

import math

import pytest
import torch

from lora_workbench.lora_files.sparse import dare, ties, trim


def random(seed):
    return torch.Generator().manual_seed(seed)


# TIES (Yadav et al. 2023)


def ties_by_the_paper(vectors, density):
    """Algorithm 1, entry by entry, lambda = 1."""
    trimmed = []
    for vector in vectors:
        values = vector.flatten().tolist()
        largest = sorted(range(len(values)), key=lambda place: -abs(values[place]))[: round(density * len(values))]
        trimmed.append([value if place in set(largest) else 0.0 for place, value in enumerate(values)])
    result = []
    for entries in zip(*trimmed, strict=True):
        sign = math.copysign(1, sum(entries)) if sum(entries) else 0
        agreeing = [entry for entry in entries if entry and math.copysign(1, entry) == sign]
        result.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return torch.tensor(result).view_as(vectors[0])


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
def test_ties_is_the_papers_algorithm(density):
    vectors = [torch.randn(12, 10, generator=random(seed)) for seed in range(3)]
    torch.testing.assert_close(ties(vectors, density), ties_by_the_paper(vectors, density))


def test_trimming_keeps_the_share_that_is_asked_for():
    change = torch.randn(40, 25, generator=random(3))
    kept = trim(change, 0.2) != 0
    assert kept.sum() == 200 and change[kept].abs().min() > change[~kept].abs().max()


# DARE (Yu et al. 2024)


def test_dare_drops_with_the_probability_and_divides_the_rest():
    change = torch.randn(200, 100, generator=random(5))
    result = dare(change, 0.3, random(0))
    stays = result != 0
    torch.testing.assert_close(result[stays], change[stays] / 0.3)
    spread = (0.3 * 0.7 / change.numel()) ** 0.5
    assert abs(stays.float().mean().item() - 0.3) < 4 * spread
    mean = torch.stack([dare(change, 0.3, random(seed)) for seed in range(400)]).mean(0)
    assert (mean - change).norm() / change.norm() < 1.1 * (0.7 / 0.3 / 400) ** 0.5
