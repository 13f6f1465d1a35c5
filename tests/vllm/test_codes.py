"""Codes of the stock ``vllm.LLM`` equal those of ``generate``, in float32."""

from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler

from llamagen.models.gpt import GPT
from tests.small_models import HEAD_VARIANTS
from tests.vllm.models import CASES, UNGUIDED_CASES, Requests, export_small


def start(folder: Path, **options: Any) -> LLM:
    """A stock LLM, as a user starts it."""
    return LLM(model=str(folder), dtype="float32", enforce_eager=True, max_num_seqs=16, **options)


def sampled(llm: LLM, requests: Requests) -> list[list[int]]:
    """Codes that vLLM samples, in one batch of all cases."""
    length = requests.gpt.config.block_size
    params = [
        SamplingParams(temperature=0, max_tokens=length - len(kept), extra_args={"llamagen": settings})
        for kept, settings in zip(requests.kept, requests.settings, strict=True)
    ]
    outputs = llm.generate(requests.prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("name", HEAD_VARIANTS)
def test_codes_equal_generate(name: str, tmp_path: Path) -> None:
    gpt = export_small(tmp_path / "model", **HEAD_VARIANTS[name])
    requests = Requests(gpt)
    requests.assert_equal(sampled(start(tmp_path / "model"), requests))


@pytest.mark.parametrize("condition", ["class", "text"])
def test_an_unguided_export_has_one_branch_and_refuses_guidance(condition: str, tmp_path: Path) -> None:
    gpt = export_small(tmp_path / "model", unguided=True, condition=condition, dim=64, n_head=2)
    requests, llm = Requests(gpt, UNGUIDED_CASES, guided=False), start(tmp_path / "model")
    assert llm.model_config.get_hidden_size() == 64
    requests.assert_equal(sampled(llm, requests))
    params = SamplingParams(temperature=0, extra_args={"llamagen": {"guidance_scale": 1.5}})
    with pytest.raises(ValueError, match=r"^guidance_scale is 1.5, but the model was exported with --unguided; .*$"):
        llm.generate(requests.prompts[0], params)


def test_preempted_requests_continue_with_the_same_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preempted = []
    preempt = Scheduler._preempt_request

    def counted(self: Scheduler, request: Any, *arguments: Any, **options: Any) -> Any:
        preempted.append(request.request_id)
        return preempt(self, request, *arguments, **options)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    gpt = export_small(tmp_path / "model", block_size=100, dim=64, n_head=2)
    requests = Requests(gpt, [case for case in CASES if case.kept == 0][:4])
    # 101 tokens of an image need 4 blocks, so that only 2 of the 12 images fit.
    llm = start(tmp_path / "model", block_size=32, num_gpu_blocks_override=9, enable_prefix_caching=True)
    requests.assert_equal(sampled(llm, requests))
    assert len(preempted) >= 3


@pytest.fixture(scope="module")
def llm_and_gpt(tmp_path_factory: pytest.TempPathFactory) -> tuple[LLM, GPT]:
    folder = tmp_path_factory.mktemp("class") / "model"
    gpt = export_small(folder, dim=64, n_head=2)
    return start(folder), gpt


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"temperature": 1.0}, {}, "temperature is 1.0; set it to 0 and give"),
        ({"n": 2}, {}, "n is 2; send one request for each image"),
        ({"logit_bias": {1: 2.0}}, {}, "logit_bias is {1: 2.0}; leave it out"),
        ({}, {"top_q": 1}, "llamagen: there is no setting 'top_q'; the settings are seed, index, temperature"),
        ({}, {"guidance_scale": -1}, "llamagen: guidance_scale is -1; it must be at least 0, and 1 is off"),
        ({}, "{", "llamagen: the settings are not valid JSON"),
    ],
)
def test_wrong_parameters_are_one_line(
    llm_and_gpt: tuple[LLM, GPT], options: dict[str, Any], settings: Any, message: str
) -> None:
    params = SamplingParams(**({"temperature": 0.0} | options), extra_args={"llamagen": settings})
    with pytest.raises(ValueError) as caught:
        llm_and_gpt[0].generate({"prompt_token_ids": [1]}, params, use_tqdm=False)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_settings_may_be_json_and_are_generates_defaults_if_missing(llm_and_gpt: tuple[LLM, GPT]) -> None:
    llm, gpt = llm_and_gpt
    requests = Requests(gpt, CASES[3:4])
    given = [{}, {"llamagen": '{"seed": 103, "index": 1}'}]
    params = [SamplingParams(temperature=0, max_tokens=16, extra_args=extra) for extra in given]
    outputs = llm.generate(requests.prompts[:1] + requests.prompts[1:2], params, use_tqdm=False)
    assert list(outputs[1].outputs[0].token_ids) != requests.codes[1].tolist()  # index 1 of odd cases is 2⁴⁰ + 1
    assert len(outputs[0].outputs[0].token_ids) == 16
