"""Waiting threads yield their core, and there are no more threads than cores in a container."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llamagen import cores


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "10000 100000"}, 1),
        ({"cpu.max": "1600000 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({"cpu.max": "nonsense"}, 8),
    ],
)
def test_reads_the_limit_of_a_container(
    files: dict[str, str], wanted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    monkeypatch.setattr(cores, "available_cores", lambda: 8)
    assert cores.usable_cores(tmp_path) == wanted


def test_wait_settings_are_set_before_torch_and_do_not_replace_the_users_settings() -> None:
    script = (
        "import os, sys\n"
        "from llamagen import cores\n"
        "cores.usable_cores = lambda: 1\n"
        "cores.available_cores = lambda: 4\n"
        "cores.share_cores()\n"
        "assert 'torch' not in sys.modules\n"
        "print(os.environ['OMP_WAIT_POLICY'], os.environ.get('GOMP_SPINCOUNT'), os.environ['OMP_NUM_THREADS'])\n"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    users = {"OMP_WAIT_POLICY": "ACTIVE", "OMP_NUM_THREADS": "3"}
    for settings, wanted in (({}, "PASSIVE 2000 1"), (users, "ACTIVE None 3")):
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            check=True,
            env={**plain, "PYTHONPATH": ".", **settings},
        )
        assert done.stdout.strip() == wanted


def test_main_sets_them_before_it_imports_torch_and_workers_do_not_import_torch() -> None:
    script = "import sys, main; print('torch' in sys.modules, 'lightning' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    source = Path("main.py").read_text()
    assert source.index("    share_cores()") < source.index("    from command_line import")
