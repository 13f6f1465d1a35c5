"""Runs pytest in forks of a process that has imported the libraries, which takes longer than most tests.

It imports nothing of this project, so that each fork imports the broken code. Each line of its input is a JSON object
with the folder, the arguments of pytest, a file for the output and a time limit in seconds; it answers with the exit
code, 124 after the time limit.
"""

import json
import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

LIBRARIES = (
    "torch",
    "torch.distributed",
    "lightning.pytorch",
    "lightning.pytorch.cli",
    "kornia",
    "pytest",
    "webdataset",
)


def main() -> None:
    """Answer requests until the input ends."""
    for library in LIBRARIES:
        import_module(library)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by commands in the background of a shell
    for line in sys.stdin:
        print(_exit_code(json.loads(line)), flush=True)


def _exit_code(request: dict[str, Any]) -> int:
    """Exit code of pytest in a fork."""
    child = os.fork()
    if child == 0:
        _run(request)
    signal.signal(signal.SIGALRM, lambda *_: os.killpg(child, signal.SIGKILL))
    signal.alarm(request["seconds"])
    _, status = os.waitpid(child, 0)
    signal.alarm(0)
    return 124 if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def _run(request: dict[str, Any]) -> None:
    """Run pytest in this process, and end it."""
    os.setsid()  # a process group of its own, which is killed as a whole
    folder = request["folder"]
    os.chdir(folder)
    sys.path[0] = folder
    os.environ["PYTHONPATH"] = folder
    with Path(request["out"]).open("wb") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    try:
        code = int(sys.modules["pytest"].main(request["arguments"]))
    except BaseException:
        code = 3
    sys.stdout.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
