"""Codes of a ``VLLMEngine`` against ``generate``: ``python -m tests.vllm.other_process FOLDER OPTIONS_AS_JSON``."""

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from tests.vllm import conftest  # noqa: F401  settings of vLLM
from tests.vllm.models import Requests, export_small


def main(folder: str, arguments: dict[str, Any]) -> None:
    """Start an engine with some arguments for the model in ``folder``, and compare its codes."""
    from vllm import SamplingParams

    from llamagen.pretrained.conditions import Prompts
    from serving.vllm.engine import VLLMEngine

    engine_arguments = {name: arguments.pop(name) for name in ("tensor_parallel", "compiled") if name in arguments}
    gpt = export_small(Path(folder) / "model", **arguments)
    requests = Requests(gpt)
    with patch.object(Prompts, "__call__", lambda *_: (torch.zeros(1), None)):  # there is no T5, which the start loads
        engine = VLLMEngine(Path(folder) / "model", device="cpu", capacity=8, **engine_arguments)
    codes: dict[int, list[int]] = {}
    for row, (prompt, kept, settings) in enumerate(
        zip(requests.prompts, requests.kept, requests.settings, strict=True)
    ):
        params = SamplingParams(
            temperature=0,
            max_tokens=gpt.config.block_size - len(kept),
            detokenize=False,
            extra_args={"llamagen": settings},
        )
        engine.engine.add_request(str(row), prompt, params)
    while engine.engine.has_unfinished_requests():
        for output in engine.engine.step():
            codes[int(output.request_id)] = list(output.outputs[0].token_ids)
    engine.close()
    requests.assert_equal([codes[row] for row in range(len(requests.codes))])
    print(f"{len(codes)} images are equal", flush=True)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
