"""Prediction metrics over batches."""

import pickle

import pytest
import torch

from llamagen.metrics import CodePrediction, PredictionStatistics

LENGTH = 6


def outcomes(seed: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    nats = torch.rand(batch, LENGTH, generator=generator) * 5
    return nats, torch.randint(12, (batch, LENGTH), generator=generator)


BATCHES = [outcomes(0, 3), outcomes(1, 1), outcomes(2, 7)]


def expected() -> PredictionStatistics:
    nats, rank = (torch.cat(parts) for parts in zip(*BATCHES, strict=True))
    return PredictionStatistics(
        nats.mean(), nats.mean().exp(), (rank == 0).float().mean(), (rank < 5).float().mean(), nats.mean(0)
    )


def assert_close(found: PredictionStatistics) -> None:
    for name, value in found._asdict().items():
        torch.testing.assert_close(value, getattr(expected(), name), msg=name)


def test_batches_are_weighted_by_their_numbers_of_codes() -> None:
    metric = CodePrediction(LENGTH)
    for batch in BATCHES:
        metric.update(*batch)
    assert_close(metric.compute())
    metric.reset()
    metric.update(torch.zeros(2, LENGTH), torch.zeros(2, LENGTH, dtype=torch.long))
    assert metric.compute()[:4] == (0.0, 1.0, 1.0, 1.0)


def test_a_uniform_prediction_has_the_vocabulary_as_perplexity() -> None:
    metric = CodePrediction(LENGTH)
    metric.update(torch.full((4, LENGTH), 16384.0).log(), torch.full((4, LENGTH), 9000))
    assert metric.compute().perplexity.item() == pytest.approx(16384, rel=1e-5)


def test_a_cast_to_16_bits_keeps_the_sums() -> None:
    metric = CodePrediction(LENGTH).bfloat16()
    for batch in BATCHES:
        metric.update(*batch)
    assert metric.nats.dtype == torch.float64
    assert_close(pickle.loads(pickle.dumps(metric)).compute())
