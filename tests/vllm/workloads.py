"""Work for an engine, as the dispatcher of the server gives it, and what the engine reports."""

from collections.abc import Callable, Sequence

from serving.engine.engine import FailureReport, ImageReport, Report, RowsReport, Work


class ScriptedInbox:
    """Gives work in portions, one at each call, and closes when all images are reported.

    Args:
        portions: work by call of ``take``; may be empty.
        cancel: called with the reports so far; returns the keys to cancel.
    """

    def __init__(self, portions: Sequence[Sequence[Work]], cancel: Callable[[list[Report]], set[int]] | None = None):
        self.portions, self.reports = [list(portion) for portion in portions], list[Report]()
        self._cancel = cancel or (lambda reports: set())

    def take(self, block: bool) -> list[Work]:
        while self.portions:
            portion = self.portions.pop(0)
            if portion or not block:
                return portion
        return []

    def cancelled(self) -> set[int]:
        return self._cancel(self.reports) - self.finished

    @property
    def closed(self) -> bool:
        return not self.portions and self.expected <= self.finished | self._cancel(self.reports)

    @property
    def finished(self) -> set[int]:
        images = {report.key for report in self.reports if isinstance(report, ImageReport)}
        failures = [report.keys for report in self.reports if isinstance(report, FailureReport)]
        return images.union(*failures)

    def start(self) -> "ScriptedInbox":
        """Remember what is expected."""
        self.expected = {work.key for portion in self.portions for work in portion}
        return self


def images(reports: Sequence[Report]) -> dict[int, ImageReport]:
    """Finished images by key; each is reported once."""
    found = [report for report in reports if isinstance(report, ImageReport)]
    assert len({report.key for report in found}) == len(found)
    return {report.key: report for report in found}


def rows_of(reports: Sequence[Report], key: int) -> list[int]:
    """Rows that were reported of an image, in order."""
    return [report.row for report in reports if isinstance(report, RowsReport) and key in report.keys]
