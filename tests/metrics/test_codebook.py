"""Codebook usage counts every code over all batches."""

from math import exp, log

import pytest
import torch

from callbacks.codebook import histogram
from llamagen.metrics import CodebookUsage


def test_usage_and_perplexity_cover_all_batches() -> None:
    metric = CodebookUsage(8)
    metric.update(torch.tensor([[[0, 0], [3, 0]]]))
    metric.update(torch.tensor([7, 7]))
    usage, perplexity, counts = metric.compute()
    assert usage.item() == 3 / 8
    assert perplexity.item() == pytest.approx(exp(-(3 / 6 * log(3 / 6) + 1 / 6 * log(1 / 6) + 2 / 6 * log(2 / 6))))
    assert counts.tolist() == [3, 0, 0, 1, 0, 0, 0, 2]


def test_usage_is_zero_without_codes() -> None:
    with pytest.warns(UserWarning, match="before the ``update``"):
        usage, perplexity, _ = CodebookUsage(8).compute()
    assert (usage.item(), perplexity.item()) == (0.0, 1.0)


def test_equally_frequent_codes_have_the_largest_perplexity() -> None:
    metric = CodebookUsage(16)
    metric.update(torch.arange(16).repeat(3))
    usage, perplexity, _ = metric.compute()
    assert usage.item() == 1.0
    assert perplexity.item() == pytest.approx(16.0)


def test_reset_clears_and_results_are_independent_copies() -> None:
    metric = CodebookUsage(4)
    metric.update(torch.tensor([1]))
    counts = metric.compute().counts
    metric.update(torch.tensor([1, 2]))
    assert counts.tolist() == [0, 1, 0, 0]
    metric.reset()
    metric.update(torch.tensor([3]))
    assert metric.compute().counts.tolist() == [0, 0, 0, 1]


def test_counts_more_codes_than_the_published_window() -> None:
    metric = CodebookUsage(4)
    metric.update(torch.full((70_000,), 2))
    assert metric.compute().counts.tolist() == [0, 0, 70_000, 0]


def test_the_histogram_shows_dead_codes_in_red() -> None:
    def red(used: int) -> int:
        counts = torch.zeros(100, dtype=torch.int64)
        counts[:used] = 5
        pixels = torch.tensor(list(histogram({"val": counts.numpy()}).getdata())).float()
        return int(((pixels[:, 0] - pixels[:, 1]) > 30).sum())

    few, many = red(90), red(10)
    assert many > 5 * few > 0
    assert red(100) == 0
