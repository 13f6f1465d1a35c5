"""The dispatcher of the server with a worker process that runs vLLM, as ``--engine vllm`` starts it."""

import multiprocessing
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
import pytest
import torch

from llamagen import LlamaGen
from llamagen.sampling import SamplingConfig
from serving.engine.dispatcher import Dispatcher
from serving.engine.requests import Ended, Finished, ImageRequest
from serving.engine.spec import WorkerSpec
from tests.vllm.models import export_small


class Answers:
    """Listener of a request."""

    def __init__(self) -> None:
        self.codes: dict[int, np.ndarray] = {}
        self.error: Any = None
        self.ended = Event()

    def __call__(self, event: Any) -> None:
        if isinstance(event, Finished):
            self.codes[event.image] = event.codes
        elif isinstance(event, Ended):
            self.error = event.error
            self.ended.set()


def assert_answered(dispatcher: Dispatcher, model: LlamaGen) -> None:
    """Assert that requests of different settings get the images of our own sampler."""
    requests, answers = [], []
    for seed in range(5):
        settings = SamplingConfig(guidance_scale=1.0 + seed, top_k=30)
        requests.append(ImageRequest((3, 4), (7, 8), seed, settings))
        answers.append(Answers())
        dispatcher.submit(requests[-1], answers[-1])
    for request, answer in zip(requests, answers, strict=True):
        assert answer.ended.wait(250)
        assert answer.error is None
        options = {"guidance_scale": request.settings.guidance_scale, "top_k": 30, "progress": False}
        expected = model.generate_codes(request.conditions, seed=request.seed, indices=[7, 8], **options)
        assert torch.equal(torch.from_numpy(np.stack([answer.codes[0], answer.codes[1]])), expected)


@pytest.mark.timeout(300)
def test_a_worker_process_answers_and_is_replaced_when_it_is_killed(tmp_path: Path) -> None:
    export_small(tmp_path / "model", dim=64, n_head=2, vocab_size=64)
    model = LlamaGen.from_pretrained(tmp_path / "model", device="cpu", compile=False)
    dispatcher = Dispatcher(WorkerSpec(str(tmp_path / "model"), engine="vllm", device="cpu", batch_size=6))
    try:
        assert (dispatcher.facts.grid, dispatcher.facts.dtype) == (4, "float32")
        assert_answered(dispatcher, model)
        (worker,) = (process for process in multiprocessing.active_children() if process.name == "engine")
        worker.kill()
        assert_answered(dispatcher, model)
    finally:
        dispatcher.close()
