"""A server for a trained model, in the shape of OpenAI's images API: ``python -m serving.server MODEL``.

MODEL is a published name such as ``c2i_L_384``, a file of weights, the folder of a run, an exported folder, or a
repository of the hub. ``docs/http_api.md`` describes requests and answers.
"""

import argparse
import time
from collections.abc import Sequence

from llamagen.command import run_command
from llamagen.cores import share_cores
from llamagen.parser_errors import OneLineParser
from serving.server.starting import answered_while_starting
from serving.start import add_window, address, listen, port_number, require_extra, stage

PORT = 8000


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the server, and serve until the process gets SIGTERM or SIGINT."""
    options = _parser().parse_args(arguments)
    require_extra("the server", ("fastapi", "uvicorn", "prometheus_client"))
    share_cores()  # footgun: before torch is imported, when OpenMP reads its settings
    begin = time.monotonic()
    connection = listen(options.host, options.port, "the server")
    with answered_while_starting(connection):
        with stage("libraries"):
            from serving.engine.dispatcher import Dispatcher
            from serving.server.app import build_app
            from serving.server.connections import FORCED, build_server
            from serving.server.keys import read_keys
            from serving.server.metrics import Metrics
            from serving.server.options import ServerOptions
            from serving.server.workers import worker_specs
        keys, specs = read_keys(options.api_key_file), worker_specs(options)
        metrics = Metrics()
        with stage(f"model {options.model} on {', '.join(str(spec.device) for spec in specs)}"):
            backend = Dispatcher(specs, queue=options.queue, observer=metrics)
    server = None
    try:
        limits = ServerOptions(options.max_images, options.timeout, keys)
        server = build_server(build_app(backend, limits, metrics), backend, options.timeout)
        seconds = time.monotonic() - begin
        print(f"{backend.facts.description}\nServing at {address(connection)} ({seconds:.1f} s)", flush=True)
        server.run(sockets=[connection])
    finally:
        if server is None or server.signals < 2:
            backend.close()
        else:
            backend.kill()
    if server.signals > 1:
        raise SystemExit(FORCED)


def _positive(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or not 0 < len(text) < 7 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive integer below a million; give one, such as 8")
    return int(text)


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 86400.0:
        raise argparse.ArgumentTypeError(f"{text} is not a time; give seconds above 0 and at most 86400")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser("python -m serving.server", __doc__ or "")
    parser.add_argument("model", help="published name, file, folder or repository of the model")
    parser.add_argument("--tokenizer", help="file or published name of the tokenizer; by default that of the model")
    parser.add_argument("--text-encoder", help="name or folder of the T5 of a text model; by default that of the model")
    parser.add_argument(
        "--devices", help="devices such as cuda:0,cuda:1, a worker on each; by default all GPUs, or cpu"
    )
    parser.add_argument("--dtype", help="float32, bfloat16 or mixed; by default that of the model")
    parser.add_argument(
        "--batch-size", type=_positive, help="images at a time on a device; default 4 on a CPU, else 16"
    )
    add_window(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 serves the whole network")
    parser.add_argument("--port", type=port_number, default=PORT, help=f"default {PORT}; 0 takes a free one")
    parser.add_argument("--queue", type=_positive, default=256, help="images that may wait; default 256")
    parser.add_argument("--max-images", type=_positive, default=16, help="images of a request; default 16")
    parser.add_argument("--timeout", type=_seconds, default=300.0, help="seconds for a request; default 300")
    parser.add_argument(
        "--api-key-file", help="file with a key per line; by default LLAMAGEN_API_KEY, or none is needed"
    )
    parser.add_argument("--engine", choices=("embedded", "vllm"), default="embedded", help="default embedded")
    parser.add_argument("--tensor-parallel", type=_positive, help="devices of a model; only with --engine vllm")
    return parser


if __name__ == "__main__":
    run_command(main)
