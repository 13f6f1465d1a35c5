"""Serve a model with Ray Serve, on this machine or a cluster: ``python -m serving.ray_serve MODEL``.

MODEL is a published name such as ``c2i_L_384``, a file of weights, the folder of a run, an exported folder, or a
repository of the hub; on a cluster, every node must reach it. ``docs/ray.md`` describes the command.
"""

import argparse
import logging
import os
import re
import secrets
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from llamagen.command import run_command
from llamagen.cores import usable_cores
from llamagen.files import atomic_file
from llamagen.parser_errors import OneLineParser
from serving.start import add_window, listen, port_number, require_extra, stage

if TYPE_CHECKING:
    from ray.serve import Application

    from serving.ray_serve.options import Options

PORT = 8000
CONNECT_SECONDS = 10.0
OBJECT_STORE = 512 * 2**20
"""Shared memory for finished images on their way to the ingress, in bytes."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the application and serve until the process is interrupted."""
    parsed = _parser().parse_args(arguments)
    require_extra("Ray Serve", ("ray", "fastapi", "pydantic"), extra="ray")
    begin = time.monotonic()
    is_local = parsed.address is None
    options = _options(parsed, is_local)
    if parsed.write_config is not None:
        _write_config(parsed.write_config, options, parsed.host, parsed.port)
        return
    if not is_local and parsed.port == 0:
        raise ValueError("--port 0 takes a free port on this machine only; give a number with --address")
    port = _free_port(parsed.host, parsed.port) if is_local else parsed.port
    _set_up_environment(is_local)
    with stage("libraries"):
        import ray
        from ray import serve

        from serving.ray_serve.app import NAME, build

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
    with stage("Ray"):
        _connect(parsed.address, options)
    interrupt = _Interrupt()  # footgun: after Ray, which installs its own handlers
    try:
        application = build(options)  # a wrong option must not end an application that runs already
        with stage(f"model {options.model}"):
            serve.start(
                proxy_location="EveryNode",
                http_options={"host": parsed.host, "port": port},
                logging_config={"log_level": "WARNING", "enable_access_log": False},
            )
            with _deleted_at_the_end(NAME):
                _run(application, NAME)
                print(f"Ready at http://{parsed.host}:{port} ({time.monotonic() - begin:.1f} s)", flush=True)
                interrupt.wait()
                print("finishing accepted requests; interrupt again to end at once", flush=True)
                _drain(NAME, options.timeout)
    finally:
        ray.shutdown()


class _Interrupt:
    """SIGINT and SIGTERM. One interruption ends the start, or the waiting, or the shutdown, and no more."""

    def __init__(self) -> None:
        self._is_waiting, self._last = False, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def wait(self) -> None:
        """Wait for a signal."""
        self._is_waiting = True
        while self._is_waiting:
            time.sleep(0.1)

    def _handle(self, *_: object) -> None:
        now = time.monotonic()
        # footgun: Ctrl-C reaches this process directly and again through parents that pass it on.
        repeats, self._last = now - self._last < 1.0, now
        if self._is_waiting:
            self._is_waiting = False
        elif not repeats:
            raise KeyboardInterrupt


def _set_up_environment(is_local: bool) -> None:
    """Settings of Ray. footgun: before it is imported, when it reads them."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # footgun: by default any other program has precedence
    if is_local and not any(name.startswith("RAY_AUTH_") for name in os.environ):
        # Only this command may talk to its Ray. A token in the environment leaves no file in the home folder.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def _connect(address: str | None, options: "Options") -> None:
    """Start Ray on this machine, or connect to a running cluster."""
    import ray

    if address is not None:
        try:
            _check_reachable(address)
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"there is no Ray cluster at --address {address} ({_last_line(str(error))}); start one on this machine "
                "with ray start --head, or join one with ray start --address=…"
            ) from error
        return
    ray.init(
        num_cpus=usable_cores(),
        include_dashboard=False,
        object_store_memory=OBJECT_STORE,
        logging_level=logging.WARNING,
        log_to_driver=False,
    )
    available = ray.cluster_resources()
    on_gpus = options.device == "cuda" or (options.device is None and "GPU" in available)
    name, each = ("GPU", 1.0) if on_gpus else ("CPU", options.cpus)
    most = max(options.replicas, options.max_replicas or 0)
    if most * each > available.get(name, 0):
        ray.shutdown()
        raise ValueError(
            f"{most} replicas need {most * each:g} {name}s, and this machine has {available.get(name, 0):g}; start "
            "fewer --replicas" + ("" if on_gpus else ", or give each fewer --cpus")
        )


def _check_reachable(address: str) -> None:
    """Connect once: Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon:
        with socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS):
            pass


def _run(application: "Application", name: str) -> None:
    """Start the application and wait until all replicas are ready.

    Raises:
        ValueError: in one line, if a replica cannot load the model.
    """
    from ray import serve

    try:
        serve.run(application, name=name)
    except RuntimeError as error:
        deployments = serve.status().applications[name].deployments.values()
        text = "\n".join([str(error), *(deployment.message for deployment in deployments)])
        if (reason := re.search(r"StartError: (.+)", text)) is None:
            raise RuntimeError(text) from error
        raise ValueError(reason[1]) from error


@contextmanager
def _deleted_at_the_end(name: str) -> Iterator[None]:
    """Delete the application at the end, and wait for it unless an interruption asks not to.

    Other applications of a cluster stay.
    """
    from ray import serve

    is_interrupted = False
    try:
        yield
    except KeyboardInterrupt:
        is_interrupted = True
        raise
    finally:
        with suppress(TimeoutError):  # Ray Serve goes on with it
            serve.delete(name, _blocking=not is_interrupted)


def _drain(name: str, seconds: float) -> None:
    """Let all servers finish their accepted requests."""
    from ray import serve

    handle = serve.get_deployment_handle("Ingress", name)
    with suppress(TimeoutError):  # a server that does not answer
        handle.broadcast("drain", seconds).results(timeout_s=seconds + 10, return_exceptions=True)


def _options(parsed: argparse.Namespace, is_local: bool) -> "Options":
    """The options of the application among those of the command."""
    from pydantic import ValidationError

    from serving.ray_serve.options import Options

    values = {name: getattr(parsed, name) for name in Options.model_fields if getattr(parsed, name) is not None}
    for name in ("model", "tokenizer", "text_encoder", "api_key_file"):
        if name in values and Path(values[name]).exists():
            values[name] = str(Path(values[name]).resolve())  # a replica has another working directory
    if is_local and parsed.device != "cuda":
        most = max(parsed.replicas or 1, parsed.max_replicas or 1)
        values.setdefault("cpus", max(usable_cores() / most, 1.0))
    try:
        return Options(**values)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise ValueError(f"{option} {first['input']}: the {first['msg'].lower()}") from None


def _write_config(path: Path, options: "Options", host: str, port: int) -> None:
    """Write a file for ``serve run`` and ``serve deploy``.

    Raises:
        ValueError: in one line, if a server with this file would not do what the same command does.
    """
    import yaml

    from serving.ray_serve.options import Options
    from serving.server.keys import VARIABLE

    assert isinstance(options, Options)
    if os.environ.get(VARIABLE) and options.api_key_file is None:
        raise ValueError(
            f"{VARIABLE} is set, but the file of --write-config has no keys, so its server would need none; give "
            f"--api-key-file, or unset {VARIABLE}"
        )
    if port == 0:
        raise ValueError("--port 0 is a free port of one start; give a number with --write-config")
    config = {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": port},
        "applications": [
            {
                "name": "llamagen",
                "route_prefix": "/",
                "import_path": "serving.ray_serve.app:build",
                "args": options.model_dump(exclude_defaults=True),
            }
        ],
    }
    with atomic_file(path) as temporary:
        temporary.write_text(yaml.safe_dump(config, sort_keys=False))


def _free_port(host: str, port: int) -> int:
    """The port, checked before Ray starts; a free one instead of 0."""
    with listen(host, port, "the server") as connection:
        return int(connection.getsockname()[1])


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser("python -m serving.ray_serve", __doc__ or "")
    add = parser.add_argument
    add("model", help="published name, file, folder or repository of the model")
    add("--tokenizer", help="file or published name of the tokenizer; by default that of the model")
    add("--text-encoder", help="name or folder of the T5 of a text model; by default that of the model")
    add("--device", help="cpu or cuda; by default GPUs if there are some, one for each replica")
    add("--dtype", help="float32, bfloat16 or mixed; by default that of the model")
    add(
        "--batch-size",
        type=int,
        help="maximum number of images that a replica generates at a time; default 4 on CPUs, 16 on GPUs",
    )
    add_window(parser)
    add("--replicas", type=int, help="number of replicas, default 1; with --max-replicas the least number")
    add("--max-replicas", type=int, help="greatest number of replicas; their number then follows the load")
    add("--target", type=float, help="calls in progress that a replica should have; default half of --batch-size")
    add(
        "--cpus",
        type=float,
        help="CPUs of a replica; default 1 with --address or --device cuda, else an equal share",
    )
    add("--servers", type=int, help="number of HTTP servers, default 1")
    add("--queue", type=int, help="images that may wait, for each server, default 256; then status 429")
    add("--max-images", type=int, help="maximum number of images of a request, default 16")
    add("--timeout", type=float, help="seconds after which a request ends with status 504, default 300")
    add("--api-key-file", help="file with API keys, one a line; default: none, or LLAMAGEN_API_KEY")
    add("--address", help="address of a running Ray cluster, or auto; by default Ray is started on this machine")
    add("--host", default="127.0.0.1", help="address to listen on, on each node; 0.0.0.0 serves the whole network")
    add("--port", type=port_number, default=PORT, help=f"default {PORT}; 0 takes a free one, without --address")
    add("--write-config", type=Path, metavar="FILE", help="only write a file for `serve run` or `serve deploy`")
    return parser


if __name__ == "__main__":
    run_command(main)
