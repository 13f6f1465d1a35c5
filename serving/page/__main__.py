"""A page for a trained model, in the browser: ``python -m serving.page SOURCE``.

SOURCE is a published name such as ``c2i_L_384``, a file of weights, the folder of a run, an exported folder, or a
repository of the hub. ``docs/page.md`` describes the page.
"""

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llamagen.command import run_command
from llamagen.cores import share_cores
from llamagen.parser_errors import OneLineParser
from serving.start import address, listen, port_number, require_extra, stage

if TYPE_CHECKING:
    from llamagen import LlamaGen
    from serving.page.worker import Worker

PORT = 7860
BATCH = {"cpu": 4, "cuda": 16}
"""Images that are generated at a time: few on a CPU, so that the first ones are finished early."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Start the page and serve it until the process is interrupted."""
    options = _parser().parse_args(arguments)
    require_extra("the page", ("gradio", "fastapi", "uvicorn"))
    share_cores()  # footgun: before torch is imported, when OpenMP reads its settings
    begin = time.monotonic()
    with stage("libraries"):
        import torch

        from llamagen import LlamaGen
        from serving.image_store import ImageStore
        from serving.page.app import build_app, build_server, upload_folder
        from serving.page.runs import Runs
        from serving.page.worker import Worker
    connection = listen(options.host, options.port, "the page")
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
        print(f"{model!r}\nOpen {address(connection)} ({time.monotonic() - begin:.1f} s)", flush=True)
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


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser("python -m serving.page", __doc__ or "")
    parser.add_argument("source", help="published name, file, folder or repository of the model")
    parser.add_argument("--tokenizer", help="file or published name of the tokenizer; by default that of the model")
    parser.add_argument("--text-encoder", help="name or folder of the T5 of a text model; by default that of the model")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; by default a GPU if there is one")
    parser.add_argument("--dtype", help="float32, bfloat16 or mixed; by default that of the model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 serves the whole network")
    parser.add_argument("--port", type=port_number, default=PORT, help=f"default {PORT}; 0 takes a free one")
    return parser


if __name__ == "__main__":
    run_command(main)
