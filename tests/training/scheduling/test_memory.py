"""The memory model: non-negative least squares on measured peaks, its margin, and what it is fitted to."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from graft.training.scheduling.memory import Load, MemoryModel, memory_limit


def fitted(coefficients: tuple[float, float, float], noise: float = 0.0, count: int = 40) -> MemoryModel:
    random, model = np.random.default_rng(0), MemoryModel()
    for _ in range(count):
        load = Load(int(random.integers(50, 4000)), int(random.integers(10_000, 4_000_000)))
        peak = coefficients[0] + coefficients[1] * load.tokens + coefficients[2] * load.squares
        model.observe(load, int(peak + noise * random.normal()))
    return model


@pytest.mark.parametrize("coefficients", [(5e9, 3e5, 40.0), (5e9, 3e5, 0.0), (1e9, 0.0, 80.0)])
def test_the_coefficients_of_made_up_peaks_are_found(coefficients: tuple[float, float, float]) -> None:
    beta, sigma = fitted(coefficients).fit()
    assert beta == pytest.approx(coefficients, rel=1e-4, abs=1e-3) and sigma < 2


def test_coefficients_are_never_negative_where_plain_least_squares_has_them_so() -> None:
    model = MemoryModel()
    for tokens, peak in ((100, 50), (200, 40), (300, 30)):
        model.observe(Load(tokens, tokens * 10), peak)
    beta, _ = model.fit()
    assert (beta >= 0).all() and beta[0] == pytest.approx(40) and beta[1:] == pytest.approx([0, 0])


def test_the_margin_is_two_percent_or_three_deviations_and_the_jobs_own_bytes_count() -> None:
    load, exact = Load(1000, 1_000_000), fitted((5e9, 3e5, 40.0))
    plain = exact.predict(load, 7_000_000, margin=False)
    assert plain == pytest.approx(5e9 + 3e8 + 4e7 + 7e6, rel=1e-6)
    assert exact.predict(load, 7_000_000, margin=True) == pytest.approx(1.02 * plain, rel=1e-6)
    noisy = fitted((5e9, 3e5, 40.0), noise=1e8)
    _, sigma = noisy.fit()
    assert sigma == pytest.approx(1e8, rel=0.4)
    room = noisy.predict(load, 0, margin=True) - noisy.predict(load, 0, margin=False)  # type: ignore[operator]
    assert room == pytest.approx(3 * sigma)
    assert MemoryModel().predict(load, 0, margin=True) is None


def test_loads_of_layouts_and_of_jobs_together() -> None:
    assert Load.of([3, 5], padded=False) == Load(8, 34) and Load.of([3, 5], padded=True) == Load(10, 50)
    one, two = Load(60, 60 * 30), Load(80, 80 * 10)
    assert Load.together([one, two], budget=1000) == Load(140, 60 * 30 + 80 * 10)
    assert Load.together([one, two], budget=100) == Load(100, min(60 * 30 + 80 * 10, 100 * 30))
    assert Load.together([one, two], budget=10).tokens == 80  # a longer sample stands alone


PEAKS = """
import torch
from graft.training.scheduling.memory import measuring
with measuring(torch.device("cpu")) as large:
    held = torch.ones(50_000_000)
del held
with measuring(torch.device("cpu")) as small:
    torch.ones(10)
print(large.num_bytes, small.num_bytes)
"""


def test_a_measured_peak_is_of_the_block_alone_where_the_system_can_say() -> None:
    # A process of its own: one that ran other tests may hold freed memory, which the block then takes without a new peak.
    answer = subprocess.run([sys.executable, "-c", PEAKS], capture_output=True, text=True, check=True).stdout
    if "None" in answer:
        pytest.skip("this system does not forget an earlier peak")
    large, small = map(int, answer.split())
    assert large - small > 150_000_000


def test_the_limit_of_memory_is_the_one_that_is_set() -> None:
    assert memory_limit(torch.device("cpu"), None) is None and memory_limit(torch.device("cpu"), 2.5) == 2_500_000_000
