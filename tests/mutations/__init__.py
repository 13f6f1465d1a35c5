"""Small patches that break the code, one bug each. CONTRIBUTING.md says when to run them."""

from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Mutation:
    """A bug.

    Attributes:
        name: what is broken, in one line.
        file: the broken file, relative to the repository.
        old: text that occurs once in the file.
        new: text that replaces it.
        tests: files or names of tests that should notice.
        meant: whether one of these tests was written for this bug.
    """

    name: str
    file: str
    old: str
    new: str
    tests: list[str]
    meant: bool = False

    def applied(self, content: str) -> str:
        """The content of the file with the bug.

        Raises:
            ValueError: if the text to replace does not occur exactly once.
        """
        if content.count(self.old) != 1 or self.old == self.new:
            raise ValueError(
                f"mutation {self.name!r}: its old text occurs {content.count(self.old)} times in {self.file}; adapt it "
                "to the present code"
            )
        return content.replace(self.old, self.new)


def mutations() -> list[Mutation]:
    """All mutations, in the order of their files."""
    return [
        Mutation(**fields)
        for file in sorted(Path(__file__).parent.glob("*.yaml"))
        for fields in yaml.safe_load(file.read_text())
    ]
