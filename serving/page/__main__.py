"""A page for a trained model, in the browser: ``python -m serving.page SOURCE``.

SOURCE is a published name such as ``c2i_L_384``, a file of weights, the folder of a run, an exported folder, or a
repository of the hub. ``docs/page.md`` describes the page.
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from llamagen.command import run_command
from llamagen.cores import share_cores
from llamagen.parser_errors import OneLineParser

if TYPE_CHECKING:
    from llamagen import LlamaGen
    from serving.page.worker import Worker

PORT = 7860
BATCH = {"cpu": 4, "cuda": 16}
"""Images that are generated at a time: few on a CPU, so that the first ones are finished early."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the page and serve it until the process is interrupted."""
    options = _parser().parse_args(arguments)
    _require_extra()
    share_cores()  # footgun: before torch is imported, when OpenMP reads its settings
    begin = time.monotonic()
    with stage("libraries"):
        import torch

        from llamagen import LlamaGen
        from serving.image_store import ImageStore
        from serving.page.app import build_app, build_server, listen, upload_folder
        from serving.page.runs import Runs
        from serving.page.worker import Worker
    connection = listen(options.host, options.port)
    with stage(f"model {options.source}"):
        place = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = LlamaGen.from_pretrained(
            options.source,
            tokenizer=options.tokenizer,
            text_encoder=options.text_encoder,
            device=options.device,
            dtype=options.dtype,
            batch_size=BATCH["cpu" if str(place).startswith("cpu") else "cuda"],
        )
    worker = Worker()
    with stage("preparation"):
        prepare(model, worker)
    with upload_folder():
        with stage("page"):
            server = build_server(build_app(Runs(model, worker, ImageStore())))
        host, port = connection.getsockname()[:2]
        print(f"{model!r}\nOpen http://{_address(host)}:{port} ({time.monotonic() - begin:.1f} s)", flush=True)
        try:
            server.run(sockets=[connection])
        finally:
            worker.close()


def prepare(model: "LlamaGen", worker: "Worker") -> None:
    """Compile, and allocate memory, in the thread that uses the model: the first click does not wait for it."""
    import torch

    from serving.page.runs import wait_for

    if (gpt := model.gpt) is None:
        return

    def work() -> None:
        model.prepare()
        model.preview(torch.zeros(model.batch_size, gpt.config.block_size, dtype=torch.int64, device=model.device), 1)

    wait_for(worker, work)


@contextmanager
def stage(name: str, show: Callable[[str], object] = lambda line: print(line, flush=True)) -> Iterator[None]:
    """Print how long a stage of the start takes."""
    begin = time.monotonic()
    yield
    show(f"{name}: {time.monotonic() - begin:.1f} s")


def _require_extra() -> None:
    missing = [name for name in ("gradio", "fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise ValueError(
            f'the page needs {missing[0]}, which is not installed; pip install -c constraints.txt -e ".[serve]"'
        )


def _address(host: str) -> str:
    if host in ("0.0.0.0", "::"):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _port(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text} is not a port; give a number from 0 to 65535")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser("python -m serving.page", __doc__ or "")
    parser.add_argument("source", help="published name, file, folder or repository of the model")
    parser.add_argument("--tokenizer", help="file or published name of the tokenizer; by default that of the model")
    parser.add_argument("--text-encoder", help="name or folder of the T5 of a text model; by default that of the model")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; by default a GPU if there is one")
    parser.add_argument("--dtype", help="float32, bfloat16 or mixed; by default that of the model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 serves the whole network")
    parser.add_argument("--port", type=_port, default=PORT, help=f"default {PORT}; 0 takes a free one")
    return parser


if __name__ == "__main__":
    run_command(main)
