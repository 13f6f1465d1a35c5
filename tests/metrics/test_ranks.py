"""Metrics over two ranks equal those of one process. All are measured in one launch."""

import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from llamagen.metrics import FID, CodebookUsage, CodePrediction, PredictionStatistics
from tests.metrics.extractors import SIZE, Projection, random_images
from tests.metrics.test_image_metric import MAKERS, fake_images, make, measured, real_images, result, show
from tests.metrics.test_prediction import BATCHES, LENGTH, assert_close
from tests.ranks import run_on_ranks


def image_metrics(rank: int) -> dict[str, dict[str, list[float]]]:
    """Results of each metric on one of two ranks, for several splits of the images."""
    found: dict[str, dict[str, list[float]]] = {}
    sides = ((real_images(), True), (fake_images(), False))
    for name in MAKERS:
        cases = found.setdefault(name, {})
        metric = make(name)
        for images, real in sides:
            show(metric, images[rank::2], real, batch_size=4)
        cases["alternating"] = result(metric)

        metric.reset()
        for images, real in sides:
            halves = torch.arange(len(images)).tensor_split([9])
            show(metric, images[halves[rank]], real, halves[rank], batch_size=4)
        cases["parts one after the other"] = result(metric)

        metric = make(name)
        for images, real in sides:
            if rank == 1:
                show(metric, images.flip(0), real, torch.arange(len(images)).flip(0), batch_size=10)
        cases["a rank with nothing"] = result(metric)

        metric = make(name)
        show(metric, real_images()[rank::2], True)
        show(metric, fake_images()[:14][rank::2])
        assert result(metric) == result(metric)
        metric = pickle.loads(pickle.dumps(metric))
        show(metric, fake_images()[14:][rank::2])
        cases["in the middle and at the end"] = result(metric)
        assert isinstance(metric.fake_rows, list)

        if rank == 0:  # one image in all
            show(lonely := make(name), fake_images()[:1])
        else:
            lonely = make(name)
        show(lonely, real_images()[rank::2], True)
        with pytest.raises(ValueError, match="1 fake images are too few"):
            lonely.compute()
        lonely.reset()
        for images, real in sides:
            show(lonely, images[rank::2], real)
        cases["after a refusal"] = result(lonely)
    return found


def codebook_usage(rank: int) -> dict[str, Tensor]:
    metric = CodebookUsage(6)
    for code in ([0, 1], [1])[rank]:  # unequal numbers of batches
        metric.update(torch.tensor([code, 5 - rank]))
    return metric.compute()._asdict()


def distance(rank: int) -> Tensor:
    metric = FID(Projection(), SIZE)
    metric.update(random_images(60, 1)[rank::2], real=True)
    if rank == 0:  # a rank may have nothing
        metric.update(random_images(50, 2, least=60), real=False)
    found: Tensor = metric.compute()
    return found


def prediction(rank: int) -> list[Tensor]:
    metric = CodePrediction(LENGTH)
    for batch in BATCHES[rank::2]:
        metric.update(*batch)
    return list(metric.compute())


def results_of_a_rank(rank: int) -> dict[str, Any]:
    """Results of all metrics on one of two ranks."""
    return {
        "image_metrics": image_metrics(rank),
        "codebook_usage": codebook_usage(rank),
        "distance": distance(rank),
        "prediction": prediction(rank),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_on_ranks(results_of_a_rank, tmp_path_factory.mktemp("ranks"))


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric")
def test_two_ranks_equal_one_process_for_any_split_of_the_images(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = rank["image_metrics"]
        assert set(found) == set(MAKERS)
        for name, cases in found.items():
            assert len(cases) == 5
            assert {case: values for case, values in cases.items() if values != measured(name)} == {}


def test_the_distance_of_two_ranks_equals_that_of_one_process(ranks: list[dict[str, Any]]) -> None:
    metric = FID(Projection(), SIZE)
    metric.update(random_images(60, 1), real=True)
    metric.update(random_images(50, 2, least=60), real=False)
    for rank in ranks:
        assert rank["distance"].item() == pytest.approx(metric.compute().item(), rel=1e-6)


def test_counts_over_ranks(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["codebook_usage"]["counts"].tolist() == [1, 2, 0, 0, 1, 2]
        assert rank["codebook_usage"]["usage"].item() == pytest.approx(4 / 6)


def test_ranks_are_weighted_by_their_numbers_of_codes(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert_close(PredictionStatistics(*rank["prediction"]))
