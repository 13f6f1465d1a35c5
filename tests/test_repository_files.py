"""The citation, the workflow, the template of bug reports and the page of reports agree with the project."""

import re
import tomllib
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_citation_has_the_version_of_the_package_and_the_paper() -> None:
    citation, project = read("CITATION.cff"), tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert (citation["version"], citation["license"]) == (project["version"], project["license"])
    assert citation["references"][0]["identifiers"][0]["value"] == "arXiv:2406.06525"


def test_the_workflow_runs_the_script_that_anyone_can_run() -> None:
    steps = read(".github/workflows/ci.yml")["jobs"]["cpu"]["steps"]
    assert [step["run"] for step in steps if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci/run").is_file()


def test_a_bug_report_asks_for_the_environment() -> None:
    labels = [part["attributes"]["label"] for part in read(".github/ISSUE_TEMPLATE/bug_report.yml")["body"]]
    assert any("python -m llamagen.environment" in label for label in labels)


def test_the_tests_named_in_the_reports_exist() -> None:
    named = set(re.findall(r"`(?:[a-z_]+/)*(test_\w+\.py)`", (ROOT / "docs/reports.md").read_text()))
    assert len(named) > 10
    assert named <= {path.name for path in (ROOT / "tests").rglob("test_*.py")}
