"""Changes as products of two small matrices: their places, sums and norms, and the nearest product of any change."""

import pytest
import torch

from lora_workbench.training.factors import Factors, factors_of


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def product(these):
    return these.up @ these.down


def test_the_norm_is_that_of_the_product():
    these = Factors(drawn(30, 3), drawn(3, 20, seed=1))
    assert these.squared_norm() == pytest.approx(product(these).square().sum().item(), rel=1e-5)


@pytest.mark.parametrize(("side", "start"), [(0, 5), (0, 0), (1, 8)])
def test_a_part_is_put_in_its_place_in_the_whole(side, start):
    small = Factors(drawn(10, 2), drawn(2, 6, seed=1)) if side == 0 else Factors(drawn(12, 2), drawn(2, 4, seed=1))
    shape = (20, 6) if side == 0 else (12, 15)
    expected = torch.zeros(shape)
    expected.narrow(side, start, product(small).shape[side]).copy_(product(small))
    torch.testing.assert_close(product(small.placed(shape, side, start)), expected)


@pytest.mark.parametrize("shape", [(40, 30), (700, 600)], ids=["small", "large"])
def test_a_dense_change_is_split_into_its_largest_factors(shape):
    low = drawn(shape[0], 3) @ drawn(3, shape[1], seed=1)
    found, whole = factors_of(low, 4)
    torch.testing.assert_close(product(found), low, rtol=1e-3, atol=1e-3)
    assert whole == pytest.approx(low.square().sum().item(), rel=1e-5)
    noisy = low + 0.01 * drawn(*shape, seed=2)
    found, whole = factors_of(noisy, 3)
    sizes = torch.linalg.svdvals(noisy.double())
    assert product(found).double().square().sum().item() == pytest.approx(sizes[:3].square().sum().item(), rel=1e-4)


def test_splitting_draws_no_global_random_number():
    before = torch.get_rng_state()
    factors_of(drawn(700, 600), 2)
    assert torch.equal(torch.get_rng_state(), before)
