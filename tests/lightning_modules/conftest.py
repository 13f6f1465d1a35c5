"""Fixtures of the tests of modules."""

from collections.abc import Iterator

import pytest

from tests.lightning_modules.rank_pair import RankPair


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankPair]:
    """Two ranks that all tests share."""
    with RankPair(tmp_path_factory.mktemp("ranks")) as pair:
        yield pair
