"""Logits that are not finite end their image, and no other."""

from dataclasses import replace
from pathlib import Path

from llamagen import LlamaGen
from llamagen.sampling import SamplingConfig
from serving.engine.engine import FailureReport, Work
from tests.small_models import small_gpt
from tests.vllm.models import checkpoint_files
from tests.vllm.workloads import SETTINGS, ScriptedInbox, assert_images, run, started


def test_logits_that_are_not_finite_fail_their_image(tmp_path: Path) -> None:
    gpt = small_gpt(dim=64, n_head=2)
    gpt.output.weight.data *= 1e3
    files = checkpoint_files(gpt, tmp_path / "model")
    works = [Work(key, key, settings=SETTINGS[key % 2 * 6]) for key in range(4)]
    works[2] = replace(works[2], settings=SamplingConfig(guidance_scale=3e38))
    with started(files["checkpoint"], tokenizer=files["tokenizer"]) as engine:
        reports = run(engine, ScriptedInbox([works]))
    (failure,) = (report for report in reports if isinstance(report, FailureReport))
    assert (failure.keys, failure.is_users) == ((2,), False)
    assert failure.message == "the logits of the autoregressive model are not finite in float32"
    model = LlamaGen.from_pretrained(files["checkpoint"], tokenizer=files["tokenizer"], device="cpu", compile=False)
    assert_images(model, [work for work in works if work.key != 2], reports)
