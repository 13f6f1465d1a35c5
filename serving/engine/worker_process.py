"""The main function of a worker process.

footgun: ``share_cores`` must run before torch is imported, so this module must not import torch, not even indirectly.
"""

import importlib
import os
import signal
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from threading import Lock, RLock, Thread
from typing import TYPE_CHECKING, Any

from llamagen.command import fault_of
from llamagen.cores import share_cores
from serving.engine.spec import ENGINES, WorkerSpec

if TYPE_CHECKING:
    from serving.engine.engine import Engine, Report
    from serving.engine.facts import ModelFacts
    from serving.engine.inbox import WorkInbox


@dataclass(frozen=True)
class Ready:
    """The engine is loaded; see :class:`~serving.engine.engine.Engine` for the attributes."""

    facts: "ModelFacts"
    capacity: int
    is_continuous: bool


@dataclass(frozen=True)
class StartFailure:
    """The engine cannot be loaded.

    Attributes:
        message: one line.
    """

    message: str


@dataclass(frozen=True)
class Cancel:
    """Nobody wants these images any more."""

    keys: tuple[int, ...]


@dataclass(frozen=True)
class Stop:
    """The engine should end."""


def run_worker(connection: Connection, spec: WorkerSpec) -> None:
    """Load an engine, and work until the other end of the connection is closed.

    Args:
        connection: to the process that started this one.
        spec: what to load.
    """
    # Ctrl-C in a terminal, and the end of a service, reach all processes of a group. The first one ends its workers
    # when their work is done, or by its own end, which closes the connection.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    share_cores()
    from tqdm import tqdm

    from serving.engine.inbox import WorkInbox
    from serving.engine.worker import finished_keys

    # footgun: otherwise its first bar makes a semaphore of the system, which stays when this process is killed.
    tqdm.set_lock(RLock())
    lock = Lock()

    def send(message: Any) -> None:
        try:
            with lock:
                connection.send(message)
        except OSError:  # the other process has ended
            os._exit(1)

    inbox = WorkInbox(lambda: send(None))
    Thread(target=_read, args=(connection, inbox), name="inbox", daemon=True).start()
    try:
        engine = load(spec)
    except Exception as error:
        fault = fault_of(error)
        if fault is None:
            traceback.print_exception(error)
        else:
            send(StartFailure(fault.message))
        return
    send(Ready(engine.facts, engine.capacity, engine.is_continuous))

    def report(message: "Report") -> None:
        inbox.forget(finished_keys(message))
        send(message)

    engine.run(inbox, report)


def load(spec: WorkerSpec) -> "Engine":
    """Build the engine that a spec names."""
    module, _, name = ENGINES.get(spec.engine, spec.engine).partition(":")
    build: Callable[[WorkerSpec], Engine] = getattr(importlib.import_module(module), name)
    return build(spec)


def _read(connection: Connection, inbox: "WorkInbox") -> None:
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            os._exit(1)  # the other process has ended, and nobody reads what this one computes
        if isinstance(message, Cancel):
            inbox.cancel(message.keys)
        elif isinstance(message, Stop):
            inbox.close()
        else:
            inbox.put(message)
