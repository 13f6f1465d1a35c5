"""The script for machines with a GPU keeps its budget, and one part cannot cost the others."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bench_sampling, bench_windows, gpu, training_rate
from benchmarks.gpu_table import table
from benchmarks.part_runner import Part, read_result, run_parts

ROOT = Path(__file__).resolve().parents[1]


def part(name: str, script: str, seconds: float = 60.0, out: Path | None = None, least: float = 0.0) -> Part:
    return Part(name, "a part", ("sh", "-c", script), seconds, out, least)


def run(*parts: Part, budget: float = 60.0, folder: Path = ROOT) -> list[dict[str, Any]]:
    return run_parts(parts, budget, folder, lambda records: None)


def alive(process: int) -> bool:
    """Whether a process runs; one that has ended may wait for its parent as a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_a_part_that_hangs_is_killed_with_its_processes_and_the_rest_still_runs(tmp_path: Path) -> None:
    out = tmp_path / "found.json"
    hangs = f"echo '{{\"cases\": [1]}}' > {out}; sleep 600 & echo $! > child; echo waiting; wait"
    first, second = run(part("hangs", hangs, 0.5, out), part("works", "exit 0"), folder=tmp_path)
    assert (first["status"], first["reason"]) == ("timed out", "killed after 0 s")
    assert first["seconds"] < 5
    assert first["last_lines"] == ["waiting"]
    assert first["result"] == {"cases": [1]}  # written before it was killed
    assert second["status"] == "ok"
    child, end = int((tmp_path / "child").read_text()), time.monotonic() + 10
    while alive(child):
        assert time.monotonic() < end


def test_the_last_lines_of_a_part_that_fails_are_recorded() -> None:
    lines = "for i in $(seq 100); do echo line $i; done; echo out of memory >&2; exit 3"
    failed, killed, silent = run(
        part("fails", lines), part("killed", "kill -9 $$"), part("silent", "exit 0", out=Path("nowhere.json"))
    )
    assert (failed["status"], failed["reason"]) == ("failed", "exit code 3")
    assert failed["last_lines"][-2:] == ["line 100", "out of memory"]
    assert len(failed["last_lines"]) == 40
    assert (killed["status"], killed["reason"]) == ("failed", "ended by signal SIGKILL")
    assert (silent["status"], silent["reason"]) == ("failed", "wrote no result")


def test_parts_beyond_the_budget_are_listed_as_not_run() -> None:
    hangs, late = run(part("hangs", "sleep 600"), part("late", "exit 0", least=1.0), budget=0.5)
    assert hangs["status"] == "timed out"  # its own limit was longer than the budget
    assert hangs["limit_s"] <= 0.5
    assert late == {
        "name": "late",
        "what": "a part",
        "command": "sh -c exit 0",
        "status": "not run",
        "reason": "0 s of 0 were left, and it needs at least 1",
    }


def test_each_report_lists_all_parts() -> None:
    seen: list[list[str]] = []
    parts = [part("one", "exit 0"), part("two", "exit 1")]
    run_parts(parts, 60.0, ROOT, lambda records: seen.append([record["status"] for record in records]))
    assert seen == [["ok", "not run"], ["ok", "failed"]]


def test_the_report_of_pytest_is_counted(tmp_path: Path) -> None:
    cases = [
        '<testcase classname="a" name="passes"/>',
        '<testcase classname="a" name="fails"><failure message="1 != 2"/></testcase>',
        '<testcase classname="a" name="breaks"><error message="no fixture"/></testcase>',
        '<testcase classname="a" name="waits"><skipped message="needs a CUDA device"/></testcase>',
    ]
    (tmp_path / "tests.xml").write_text(f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>")
    assert read_result(tmp_path / "tests.xml") == {
        "tests": 4,
        "passed": 1,
        "failed": {"a.fails": "1 != 2", "a.breaks": "no fixture"},
        "skipped": {"a.waits": "needs a CUDA device"},
    }
    (tmp_path / "half.xml").write_text("<testsuites><testsuite>")
    assert read_result(tmp_path / "half.xml") is None


@pytest.mark.parametrize("dry_run", [False, True])
def test_every_part_is_a_command_that_its_program_understands(
    dry_run: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {
        "benchmarks.bench_sampling": bench_sampling,
        "benchmarks.bench_windows": bench_windows,
        "benchmarks.training_rate": training_rate,
    }
    parts = gpu.all_parts(tmp_path, dry_run)
    assert len({part.name for part in parts}) == len(parts)
    for each in parts:
        python, _, module, *options = each.command
        assert python == sys.executable
        assert each.least < each.seconds < gpu.BUDGET
        assert ("cuda" in options) is not (dry_run or module == "pytest")
        if module != "pytest":
            monkeypatch.setattr(sys, "argv", [module, *options])
            assert programs[module].arguments().out == each.out


def test_the_tests_for_gpus_are_found() -> None:
    found = gpu.gpu_tests()
    assert "tests/sampling/gpu/test_decoder.py" in found
    assert "tests/sampling/gpu/test_step.py" in found
    assert "tests/sampling/gpu/test_window_step.py" in found


@pytest.fixture
def two_parts(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The script with two parts of its own, one of which fails."""
    monkeypatch.setattr(gpu, "all_parts", lambda folder, dry: [part("good", "exit 0"), part("bad", "echo why; exit 2")])
    monkeypatch.setattr(gpu, "environment", lambda: {"torch": "0", "GPUs": "none"})
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    return monkeypatch


def test_the_exit_code_and_the_record_show_a_failure(
    two_parts: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "gpu.json"
    two_parts.setattr(sys, "argv", ["gpu", "--dry-run", f"--out={out}"])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == 1
    record = json.loads(out.read_text())
    assert [each["status"] for each in record["parts"]] == ["ok", "failed"]
    assert record["environment"]["torch"] == "0"
    output = capsys.readouterr().out
    assert "exit code 2" in output
    assert "| why" in output


def test_only_some_parts_run_on_request(two_parts: pytest.MonkeyPatch, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    two_parts.setattr(sys, "argv", ["gpu", "--dry-run", f"--out={out}", "--only", "good"])
    gpu.main()
    assert [each["name"] for each in json.loads(out.read_text())["parts"]] == ["good"]
    two_parts.setattr(sys, "argv", ["gpu", "--dry-run", f"--out={out}", "--only", "ugly"])
    with pytest.raises(SystemExit, match="--only ugly names no part; the parts are good, bad"):
        gpu.main()


def test_without_a_gpu_only_a_dry_run_is_possible(two_parts: pytest.MonkeyPatch, tmp_path: Path) -> None:
    two_parts.setattr("torch.cuda.is_available", lambda: False)
    two_parts.setattr(sys, "argv", ["gpu", f"--out={tmp_path / 'gpu.json'}"])
    with pytest.raises(SystemExit, match="PyTorch finds no GPU here; use --dry-run to try the script on a CPU"):
        gpu.main()
    assert not list(tmp_path.iterdir())


def test_the_table_shows_results_of_every_kind() -> None:
    spread = {"median": 2.0, "q1": 1.5, "q3": 2.5}
    side = {**spread, "images_s": 4.0, "ms_a_step": 0.5, "repeats": 3, "gib": 1.25}
    case = {"size": "B", "batch": 8, "compiled": side, "static": side, "ratios": {"static": spread}}
    step = {**spread, "images_s": 9.0, "loss_first": 9.7, "loss_last": 9.1, "fault": "", "mfu": 0.4, "peak_gib": 2.0}
    results: list[dict[str, Any]] = [
        {"tests": 3, "passed": 1, "failed": {"a.b": "no"}, "skipped": {"a.c": "why"}},
        {"cases": [{**case, "failed": {"static_graphs": "OutOfMemoryError"}}]},
        {"eager": step, "compiled": {**step, "scale_last": 65536.0, "skipped_steps": 1}},
        {"ours": step, "in_turns": {"plain / ours": spread}},
    ]
    parts = [{"name": f"p{i}", "what": "", "status": "ok", "seconds": 1.0, "result": r} for i, r in enumerate(results)]
    text = "\n".join(table({"environment": {"GPUs": "a GPU", "torch": "2"}, "parts": parts}))
    for shown in (
        "1 of 3 tests passed, 1 were skipped",
        "failed: a.b: no",
        "× 2.00 (1.50, 2.50), 3 turns",
        "static_graphs failed: OutOfMemoryError",
        "MFU 40.0%",
        "scale 65536, 1 steps skipped",
        "plain / ours, in turns: 2.00 (1.50, 2.50)",
    ):
        assert shown in text
