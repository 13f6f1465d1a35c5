"""``python -m serving.ray_serve`` in a process of its own, all of whose processes end with the test."""

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

MARKER = "RAY_TMPDIR"
"""Variable with the folder of this run, by which its processes are recognised."""
START_SECONDS = 100
TICK = 0.01


class Answer(NamedTuple):
    """What the server said."""

    status: int
    body: Any
    headers: Any

    @property
    def images(self) -> list[np.ndarray]:
        """Pixels (H, W, 3) uint8 of each image."""
        files = [b64decode(image["b64_json"]) for image in self.body["data"]]
        return [np.asarray(Image.open(io.BytesIO(file))) for file in files]


class RayCommand:
    """The running command.

    Args:
        process: the command.
        folder: its temporary folder.
        output: file with what it prints.
    """

    def __init__(self, process: "subprocess.Popen[bytes]", folder: Path, output: Path) -> None:
        self.process, self.folder, self._output = process, folder, output
        wait_for(lambda: "Ready at" in self.text or process.poll() is not None, START_SECONDS)
        assert "Ready at" in self.text, self.text
        self.address = self.text.split("Ready at ")[1].split()[0]

    @property
    def text(self) -> str:
        """What it has printed."""
        return self._output.read_text()

    def request(self, path: str, body: object = None) -> Answer:
        """GET, or POST with a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=100) as response:
                return Answer(response.status, json.load(response), response.headers)
        except urllib.error.HTTPError as error:
            return Answer(error.code, json.loads(error.read()), error.headers)

    def generate(self, condition: int, count: int, seed: int) -> Answer:
        """Ask for images."""
        return self.request("/v1/images/generations", {"prompt": condition, "n": count, "seed": seed})

    def replicas(self) -> list[int]:
        """Processes with the model."""
        return [process for process in processes_of(self.folder) if ":Model" in name_of(process)]

    def logs(self) -> str:
        """What its actors have printed."""
        return "".join(path.read_text() for path in self.folder.glob("ray/session_2*/logs/worker-*.err"))


@contextmanager
def ray_command(arguments: list[str], output: Path) -> Iterator[RayCommand]:
    """Start the command, and end it and everything that it started."""
    folder = Path(tempfile.mkdtemp(prefix="r", dir="/tmp"))  # short, because sockets lie in it
    environment = {**os.environ, MARKER: str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "serving.ray_serve", *arguments, "--port", "0"]
    try:
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        yield RayCommand(process, folder, output)
    finally:
        for running in processes_of(folder):
            with suppress(ProcessLookupError):
                os.kill(running, signal.SIGKILL)
        process.wait(30)
        subprocess.run(["rm", "-rf", str(folder)], check=True)


def processes_of(folder: Path) -> list[int]:
    """Processes with this temporary folder."""
    marker = f"{MARKER}={folder}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if marker in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def name_of(process: int) -> str:
    """Title of a process, empty if it has ended."""
    with suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text()
    return ""


def cpu_ticks(process: int) -> int:
    """CPU time that a process has used, in ticks of the system."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Wait until something is true, at most so long."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(TICK)
