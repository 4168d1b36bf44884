"""Intervals and correlations against numbers worked out by hand, and quantiles against printed tables."""

import pytest

from experiments.statistics import entropy_bits, estimate, never_falls, paired, rank_correlation, student_quantile

QUANTILES = {1: 12.7062047362, 2: 4.3026527297, 3: 3.1824463053, 4: 2.7764451052, 9: 2.2621571628, 30: 2.0422724563}


def test_quantiles_are_those_of_the_tables():
    for degrees, quantile in QUANTILES.items():
        assert student_quantile(degrees) == pytest.approx(quantile, rel=1e-9)
    assert student_quantile(4, 0.99) == pytest.approx(4.6040948713, rel=1e-9)


def test_a_paired_difference_is_over_common_seeds():
    """0.4, 0.2 and 0.2: mean 4/15, standard deviation 0.2/√3, so the half interval is 4.30265 · 0.2 / 3."""
    found = paired({0: 0.9, 1: 0.8, 2: 0.7, 7: 99.0}, {2: 0.5, 1: 0.6, 0: 0.5, 8: 0.0})
    assert found.seeds == 3
    assert found.mean == pytest.approx(4 / 15)
    assert found.deviation == pytest.approx(0.2 / 3**0.5)
    half = 4.3026527297 * 0.2 / 3
    assert found.interval == pytest.approx((4 / 15 - half, 4 / 15 + half))
    assert found.sign == 0
    assert estimate([0.4, 0.3, 0.2]).sign == 1  # 0.3 ± 0.248
    assert estimate([-0.4, -0.3, -0.2]).sign == -1


def test_one_seed_says_nothing():
    assert paired({0: 1.0}, {1: 1.0}) is None
    found = paired({0: 1.0}, {0: 0.0})
    assert (found.mean, found.deviation, found.interval, found.sign) == (1.0, None, None, None)


def test_ranks_that_are_equal_are_shared():
    assert rank_correlation(range(4), [0.1, 0.1, 0.5, 0.9]) == pytest.approx(4.5 / (5 * 4.5) ** 0.5)
    assert rank_correlation(range(3), [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation(range(3), [2, 2, 2]) == 0
    assert never_falls([1, 1, 2])
    assert not never_falls([1, 2, 1.9])


def test_entropy_of_counts():
    assert entropy_bits([1, 1, 2, 0]) == pytest.approx(1.5)
