"""A test that hangs ends, and the report names it, even if it hangs in native code that holds Python's lock."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HANGING = """
import ctypes, threading

def test_waits_for_ever():
    threading.Event().wait()

def test_hangs_in_native_code():
    ctypes.PyDLL(None).pause()

def test_after_them():
    pass
"""


def test_hanging_tests_end_with_their_names(tmp_path: Path) -> None:
    (tmp_path / "test_hanging.py").write_text(HANGING)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-n", "1", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider"),
            *("-o", "timeout=0.5", "-o", "faulthandler_timeout=1", f"--rootdir={tmp_path}", str(tmp_path)),
        ],
        # Starting fewer plugins makes the three processes of this test start faster.
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin,pytest_timeout"},
        capture_output=True,
        text=True,
        timeout=140,
    )
    assert done.returncode == 1, done.stdout
    failed = re.findall(r"^FAILED \S*::(\w+)", done.stdout, re.M)
    assert sorted(failed) == ["test_hangs_in_native_code", "test_waits_for_ever"]
    assert "2 failed, 1 passed" in done.stdout


def test_the_suite_has_limits_for_both_kinds_of_hanging(pytestconfig: object) -> None:
    limits = [float(pytestconfig.getini(name)) for name in ("timeout", "faulthandler_timeout")]  # type: ignore[attr-defined]
    assert 0 < limits[0] < limits[1] <= 900
    assert pytestconfig.getini("faulthandler_exit_on_timeout")  # type: ignore[attr-defined]
