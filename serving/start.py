"""What the commands that serve have in common: stages of the start, ports, missing packages.

footgun: this module must not import torch, because ``share_cores`` has to run first.
"""

import argparse
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal


@contextmanager
def stage(name: str, show: Callable[[str], object] = lambda line: print(line, flush=True)) -> Iterator[None]:
    """Print how long a stage of the start takes."""
    begin = time.monotonic()
    yield
    show(f"{name}: {time.monotonic() - begin:.1f} s")


def require_extra(what: str, packages: Sequence[str], extra: str = "serve") -> None:
    """Check that optional packages are installed.

    Args:
        what: what needs them, such as ``the page``.
        packages: names of their modules.
        extra: extra of this project that installs them.

    Raises:
        ValueError: in one line with the command that installs them.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise ValueError(
            f'{what} needs {missing[0]}, which is not installed; pip install -c constraints.txt -e ".[{extra}]"'
        )


def listen(host: str, port: int, what: str) -> socket.socket:
    """Take a port, before models are loaded.

    Args:
        host: address of this machine to listen on.
        port: number of the port; 0 for any free one.
        what: what listens, such as ``the page``, for the error message.

    Raises:
        ValueError: in one line, if it is not available.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen(128)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"{what} cannot listen on {host}, port {port} ({reason.lower()}); give a free --port, or another --host"
        ) from error
    return found


def address(connection: socket.socket) -> str:
    """Address of a listening socket, as a browser on this machine opens it."""
    host, port = connection.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def add_window(parser: argparse.ArgumentParser) -> None:
    """Add the option ``--window`` to a command that loads a model. It is None if it is not given."""
    parser.add_argument(
        "--window",
        type=window_size,
        metavar="N|auto",
        help="codes of an image that a pass may decide, or auto; changes no image; default auto on CPUs, 1 on GPUs",
    )


def window_size(text: str) -> int | Literal["auto"]:
    """Type of the option ``--window``."""
    if text == "auto":
        return "auto"
    if not text.isascii() or not text.isdecimal() or not 0 < len(text) < 7 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a window; give a number of codes (1, 2, …) or auto")
    return int(text)


def port_number(text: str) -> int:
    """Type of the option ``--port``."""
    if not text.isascii() or not text.isdecimal() or len(text) > 5 or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port; give a number from 0 to 65535")
    return int(text)
