"""Percentiles of the sketch against those of the sorted values."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gym_sdk.metrics import QuantileSketch

FRACTIONS = (0.0, 0.01, 0.5, 0.95, 0.99, 1.0)

sizes = st.one_of(st.just(0.0), st.floats(1e-9, 1e12), st.floats(-1e12, -1e-9), st.integers(-5, 5))


def nearest_rank(values: list[float], fraction: float) -> float:
    return sorted(values)[max(1, math.ceil(fraction * len(values))) - 1]


def sketch_of(values: list[float], *, distinct: int = 256) -> QuantileSketch:
    sketch = QuantileSketch(distinct=distinct)
    for value in values:
        sketch.add(value)
    return sketch


def assert_within(sketch: QuantileSketch, values: list[float], error: float) -> None:
    for fraction in FRACTIONS:
        expected = nearest_rank(values, fraction)
        assert sketch.quantile(fraction) == pytest.approx(expected, rel=error * 1.000001, abs=1e-9), fraction


@given(st.lists(sizes, min_size=1, max_size=60), st.sampled_from([0, 4, 256]))
def test_every_percentile_is_within_the_stated_error(values: list[float], distinct: int) -> None:
    sketch = sketch_of(values, distinct=distinct)
    assert sketch.count == len(values)
    assert sketch.greatest == max(values)
    assert sketch.mean == pytest.approx(sum(values) / len(values), rel=1e-9, abs=1e-3)
    assert_within(sketch, values, 0.0 if sketch.exact else 0.01)


@pytest.mark.parametrize("shape", ["lognormal", "uniform", "tokens"])
def test_long_streams_stay_within_the_error_and_small(shape: str) -> None:
    source = random.Random(shape)
    draw = {
        "lognormal": lambda: source.lognormvariate(0.0, 4.0),
        "uniform": source.random,
        "tokens": lambda: float(source.randint(1, 32_768)),
    }[shape]
    values = [draw() for _ in range(20_000)]
    sketch = sketch_of(values)
    assert not sketch.exact
    assert_within(sketch, values, 0.01)
    assert len(sketch._buckets) < 2_764
    assert len(sketch._pending) < 512


@given(
    st.lists(sizes, max_size=40),
    st.lists(sizes, max_size=40),
    st.sampled_from([(0, 0), (0, 256), (256, 0), (256, 256), (8, 8)]),
)
def test_a_merged_sketch_is_that_of_all_values(
    first: list[float], second: list[float], distinct: tuple[int, int]
) -> None:
    merged = sketch_of(first, distinct=distinct[0])
    merged.merge(sketch_of(second, distinct=distinct[1]))
    assert merged.count == len(first) + len(second)
    if merged.count:
        assert merged.greatest == max(first + second)
        assert_within(merged, first + second, 0.01)


def test_few_different_values_stay_exact_for_ever() -> None:
    sketch = sketch_of([float(n % 7) for n in range(10_000)])
    assert sketch.exact
    assert [sketch.quantile(fraction) for fraction in (0.5, 1.0)] == [3.0, 6.0]
    assert "exact" in repr(sketch)


def test_what_is_not_finite_is_left_out() -> None:
    sketch = sketch_of([math.nan, 1.0, math.inf, 3.0, -math.inf])
    assert (sketch.count, sketch.mean, sketch.greatest) == (2, 2.0, 3.0)
    assert sketch_of([math.nan]).quantile(0.5) is None


def test_the_extremes_share_a_bucket() -> None:
    sketch = sketch_of([1e300, 1e-300, -1e300], distinct=0)
    assert sketch.quantile(0.5) == 0.0
    assert (sketch.quantile(0.0), sketch.quantile(1.0)) == (
        pytest.approx(-1e15, rel=0.01),
        pytest.approx(1e15, rel=0.01),
    )


def test_an_empty_sketch_has_no_numbers_and_bad_arguments_are_refused() -> None:
    sketch = QuantileSketch()
    assert (sketch.count, sketch.mean, sketch.greatest, sketch.quantile(0.5)) == (0, None, None, None)
    with pytest.raises(ValueError, match="fraction"):
        sketch.quantile(1.5)
    with pytest.raises(ValueError, match="relative_error"):
        QuantileSketch(1.0)
    with pytest.raises(ValueError, match="different relative errors"):
        sketch.merge(QuantileSketch(0.1))
