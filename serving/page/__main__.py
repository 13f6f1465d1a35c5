"""A page for a trained model, in the browser: ``python -m serving.page MODEL``, or ``--server URL``.

MODEL is a published name such as ``c2i_L_384``, a file of weights, the folder of a run, an exported folder, or a
repository of the hub. With ``--server`` the page uses the model of a server, ``python -m serving.server``, on this or
another machine. ``docs/page.md`` describes the page.
"""

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llamagen.command import run_command
from llamagen.cores import share_cores
from llamagen.parser_errors import OneLineParser
from serving.start import add_window, address, listen, port_number, require_extra, stage

if TYPE_CHECKING:
    from serving.engine.requests import Backend

PORT = 7860
OF_THE_MODEL = ("tokenizer", "text_encoder", "device", "dtype", "window")
"""Options for loading a model."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the page and serve it until the process is interrupted."""
    options = _parser().parse_args(arguments)
    _check(options)
    require_extra("the page", ("gradio", "fastapi", "uvicorn"))
    share_cores()  # footgun: before torch is imported, when OpenMP reads its settings
    begin = time.monotonic()
    with stage("libraries"):
        from serving.image_store import ImageStore
        from serving.page.app import build_app, build_server, upload_folder
        from serving.page.runs import Runs
    connection = listen(options.host, options.port, "the page")
    with stage(f"server {options.server}" if options.server is not None else f"model {options.source}"):
        backend = _backend(options)
    try:
        with upload_folder():
            with stage("page"):
                server = build_server(build_app(Runs(backend, ImageStore())))
            print(
                f"{backend.facts.description}\nOpen {address(connection)} ({time.monotonic() - begin:.1f} s)",
                flush=True,
            )
            server.run(sockets=[connection])
    finally:
        backend.close()


def _backend(options: argparse.Namespace) -> "Backend":
    """The server, or the model in this process. Only what is needed is imported."""
    if options.server is not None:
        from serving.page.remote import RemoteBackend
        from serving.server.keys import read_keys

        return RemoteBackend(options.server, next(iter(read_keys(options.api_key_file)), None))
    from serving.page.local import local_backend

    return local_backend(options.source, **{name: getattr(options, name) for name in OF_THE_MODEL})


def _check(options: argparse.Namespace) -> None:
    """Check options that exclude each other.

    Raises:
        ValueError: in one line.
    """
    if options.server is None:
        if options.source is None:
            raise ValueError("the page has no model; give a MODEL, or a server with --server URL")
        if options.api_key_file is not None:
            raise ValueError("--api-key-file is for --server; leave it out, or give a server")
        return
    if options.source is not None:
        raise ValueError(f"both the model {options.source} and --server are given; give one of them")
    for name in OF_THE_MODEL:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is for a MODEL; give it to the server instead of the page")


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser("python -m serving.page", __doc__ or "")
    parser.add_argument(
        "source", nargs="?", metavar="MODEL", help="published name, file, folder or repository of the model"
    )
    parser.add_argument("--tokenizer", help="file or published name of the tokenizer; by default that of the model")
    parser.add_argument("--text-encoder", help="name or folder of the T5 of a text model; by default that of the model")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; by default a GPU if there is one")
    parser.add_argument("--dtype", help="float32, bfloat16 or mixed; by default that of the model")
    add_window(parser)
    parser.add_argument("--server", metavar="URL", help="address of a server to use instead of a model of its own")
    parser.add_argument(
        "--api-key-file", metavar="FILE", help="file with the API key of the server; by default LLAMAGEN_API_KEY"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 serves the whole network")
    parser.add_argument("--port", type=port_number, default=PORT, help=f"default {PORT}; 0 takes a free one")
    return parser


if __name__ == "__main__":
    run_command(main)
