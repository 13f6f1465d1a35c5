"""Run the steps of the Dockerfile without a container engine: in a Debian root folder, with chroot.

It shows that the steps work, not that an image of a registry's base does. Needs root and debootstrap:

    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm ROOT
    python -m benchmarks.dockerfile_steps ROOT --model FOLDER [--build-arg PIP_ARGS=] [--share PATH …] [--out FILE]

``FROM python`` becomes a virtual environment in ``/usr/local``. At the end the entry point runs as the image's user
with an exported model, until the health check succeeds, and is ended like by ``docker stop``.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.timing import machine
from llamagen.command import run_command
from llamagen.files import atomic_file
from llamagen.parser_errors import OneLineParser

PROJECT = Path(__file__).resolve().parents[1]
KNOWN = ("ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "RUN", "USER", "VOLUME", "WORKDIR")
BASE_PATH = "/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"
HEALTH_SECONDS = 300.0
STOP_SECONDS = 60.0


class Step(NamedTuple):
    """An instruction of a Dockerfile.

    Attributes:
        name: in capitals.
        text: its arguments in one line.
    """

    name: str
    text: str


def read_steps(text: str) -> list[Step]:
    """Instructions of a Dockerfile in order.

    Raises:
        ValueError: for an instruction that this program does not know.
    """
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    steps = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        name, _, rest = line.partition(" ")
        if name not in KNOWN:
            raise ValueError(f"the Dockerfile has the instruction {name}; the known ones are {', '.join(KNOWN)}")
        steps.append(Step(name, rest.strip()))
    return steps


def ignored(path: str, patterns: Sequence[str]) -> bool:
    """Whether ``.dockerignore`` excludes a path: the last pattern that matches it, or a folder above it, decides."""
    parts = path.split("/")
    above = ["/".join(parts[: count + 1]) for count in range(len(parts))]
    result = False
    for pattern in patterns:
        keep, plain = pattern.startswith("!"), pattern.removeprefix("!")
        if any(fnmatch(each, plain) or fnmatch(each, plain.removeprefix("**/")) for each in above) or (
            plain.startswith("**/") and any(fnmatch(part, plain.removeprefix("**/")) for part in parts)
        ):
            result = not keep
    return result


def copied_files(source: str, patterns: Sequence[str]) -> list[str]:
    """Files below a path of the project that the build context has.

    Raises:
        ValueError: if there are none.
    """
    path = PROJECT / source
    paths = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    names = [name for each in paths if not ignored(name := each.relative_to(PROJECT).as_posix(), patterns)]
    if not names:
        raise ValueError(f"COPY {source}: there is no such file, or .dockerignore excludes it; correct one of them")
    return names


class Build:
    """A build in a root folder.

    Args:
        root: a Debian root folder with python3 and python3-venv.
        arguments: values of build arguments.
    """

    def __init__(self, root: Path, arguments: dict[str, str]) -> None:
        self.root, self.arguments = root, arguments
        self.environment = {"PATH": BASE_PATH, "HOME": "/root", "LANG": "C.UTF-8"}
        self.folder, self.user, self.entry, self.health = "/", "root", list[str](), list[str]()
        self.ignore = (PROJECT / ".dockerignore").read_text().split()

    def run(self, step: Step) -> None:
        """Run an instruction."""
        {"ARG": self._arg, "ENV": self._env, "COPY": self._copy}.get(step.name, self._other)(step)

    def command(self, words: Sequence[str]) -> list[str]:
        """A command in the root folder, in the current folder and as the current user."""
        inside = 'cd "$0" && exec "$@"'
        user = [] if self.user == "root" else [f"--userspec={self.user}:{self.user}"]
        return ["chroot", *user, str(self.root), "/bin/sh", "-c", inside, self.folder, *words]

    def _expand(self, text: str) -> str:
        return re.sub(r"\$\{(\w+)\}", lambda match: self.arguments.get(match[1], ""), text)

    def _arg(self, step: Step) -> None:
        name, _, default = step.text.partition("=")
        self.arguments.setdefault(name, shlex.split(default)[0] if default else "")

    def _env(self, step: Step) -> None:
        self.environment |= dict(pair.split("=", 1) for pair in shlex.split(self._expand(step.text)))

    def _copy(self, step: Step) -> None:
        *sources, target = step.text.split()
        for source in sources:
            for name in copied_files(source, self.ignore):
                below = name.removeprefix(source).strip("/")
                place = self.root / self.folder.strip("/") / target.removeprefix("./") / (below or Path(name).name)
                with atomic_file(place) as temporary:
                    shutil.copyfile(PROJECT / name, temporary)
                place.chmod(0o644)

    def _other(self, step: Step) -> None:
        if step.name == "FROM":
            if not step.text.startswith("python:"):
                raise ValueError(f"FROM {step.text}: only images of python are imitated")
            self._shell("python3 -m venv /usr/local && ln -sf pip3 /usr/local/bin/pip")
        elif step.name == "WORKDIR":
            self.folder = step.text
            (self.root / step.text.strip("/")).mkdir(parents=True, exist_ok=True)
        elif step.name == "USER":
            self.user = step.text
            users = [line.split(":") for line in (self.root / "etc/passwd").read_text().splitlines()]
            self.environment["HOME"] = next(fields[5] for fields in users if step.text in (fields[0], fields[2]))
        elif step.name == "RUN":
            self._shell(step.text)
        elif step.name == "ENTRYPOINT":
            self.entry = json.loads(step.text)
        elif step.name == "HEALTHCHECK":
            self.health = json.loads(step.text.partition("CMD ")[2])

    def _shell(self, text: str) -> None:
        environment = {**self.environment, **self.arguments}
        done = subprocess.run(self.command(["/bin/sh", "-c", text]), env=environment, capture_output=True, text=True)
        if done.returncode:
            raise ValueError(f"RUN {text} failed with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")


def check_server(build: Build, model: Path) -> dict[str, Any]:
    """Run the entry point with a model until the health check succeeds, then end it.

    Args:
        build: a finished build.
        model: folder of a model in the root folder, as seen from inside.

    Raises:
        ValueError: if it does not become healthy, or does not end with exit code 0.
    """
    start = time.monotonic()
    process = subprocess.Popen(
        build.command([*build.entry, str(model)]),
        env=build.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        while subprocess.run(build.command(build.health), env=build.environment, capture_output=True).returncode:
            if process.poll() is not None or time.monotonic() - start > HEALTH_SECONDS:
                process.kill()
                output, _ = process.communicate()
                seconds = time.monotonic() - start
                raise ValueError(f"the server is not healthy after {seconds:.0f} s: {output.decode()[-1000:]}")
            time.sleep(0.5)
        healthy = time.monotonic() - start
        process.terminate()
        output, _ = process.communicate(timeout=STOP_SECONDS)
        if process.returncode:
            raise ValueError(f"the server ended with exit code {process.returncode}: {output.decode()[-1000:]}")
        return {"seconds_until_healthy": round(healthy, 1), "exit_code": process.returncode}
    finally:
        process.kill()


@contextmanager
def mounted(source: Path, target: Path) -> Iterator[None]:
    """A folder that is visible at another place."""
    target.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "--bind", str(source), str(target)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(target)], check=False)


def size_in_mb(root: Path) -> float:
    """Size of the files of a folder in MB."""
    done = subprocess.run(["du", "-sk", str(root)], capture_output=True, text=True, check=True)
    return round(int(done.stdout.split()[0]) * 1024 / 1e6, 1)


def main(given: Sequence[str] | None = None) -> None:
    parser = OneLineParser("python -m benchmarks.dockerfile_steps", (__doc__ or "").split("\n")[0])
    parser.add_argument("root", type=Path, help="folder made by debootstrap; it is changed")
    parser.add_argument("--build-arg", nargs="*", default=[], metavar="NAME=VALUE", help="as of docker build")
    parser.add_argument("--share", nargs="*", type=Path, default=[], help="folders of this machine to see, as of pip's")
    parser.add_argument("--model", type=Path, required=True, help="exported model that the server loads at the end")
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    options = parser.parse_args(given)
    if os.geteuid():
        raise ValueError("chroot needs root; run this as root")
    build = Build(options.root.resolve(), dict(pair.split("=", 1) for pair in options.build_arg))
    record: dict[str, Any] = {
        "benchmark": "dockerfile_steps",
        "hardware": machine("cpu"),
        "command": "python -m benchmarks.dockerfile_steps ROOT --model FOLDER",
        "steps": [],
    }
    record["mb_before"] = size_in_mb(build.root)
    shutil.copy("/etc/resolv.conf", build.root / "etc/resolv.conf")
    with ExitStack() as mounts:
        for path in (Path("/proc"), Path("/dev"), *options.share):
            mounts.enter_context(mounted(path, build.root / str(path).strip("/")))
        for step in tqdm(read_steps((PROJECT / "Dockerfile").read_text()), unit="step"):
            start = time.monotonic()
            build.run(step)
            record["steps"].append({"step": f"{step.name} {step.text}", "seconds": round(time.monotonic() - start, 1)})
        mounts.enter_context(mounted(options.model.resolve(), build.root / "model"))
        record["server"] = check_server(build, Path("/model"))
    record["mb"] = size_in_mb(build.root)  # without what was mounted
    for step_record in record["steps"]:
        print(f"{step_record['seconds']:7.1f} s  {step_record['step'][:100]}")
    print(f"{record['mb'] - record['mb_before']:.0f} MB more than the base; server: {record['server']}")
    if options.out:
        with atomic_file(options.out) as temporary:
            temporary.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
