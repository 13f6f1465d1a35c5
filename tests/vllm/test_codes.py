"""Codes of the stock ``vllm.LLM`` equal those of ``generate``, in float32."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.core.sched.scheduler import Scheduler

from llamagen.models.gpt import GPT
from llamagen.sampling import generate
from serving.vllm.prompts import label_prompt
from tests.small_models import HEAD_VARIANTS, RECIPE_VARIANTS
from tests.vllm.models import CASES, UNGUIDED_CASES, Requests, export_small


@contextmanager
def started(folder: Path, **options: Any) -> Iterator[LLM]:
    """A stock LLM, as a user starts it. A process can have one at a time."""
    llm = LLM(model=str(folder), dtype="float32", enforce_eager=True, max_num_seqs=16, **options)
    yield llm
    llm.llm_engine.engine_core.shutdown()


def sampled(llm: LLM, requests: Requests) -> list[list[int]]:
    """Codes that vLLM samples, in one batch of all cases."""
    length = requests.gpt.config.block_size
    params = [
        SamplingParams(temperature=0, max_tokens=length - len(kept), extra_args={"llamagen": settings})
        for kept, settings in zip(requests.kept, requests.settings, strict=True)
    ]
    outputs = llm.generate(requests.prompts, params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


VARIANTS = {
    **HEAD_VARIANTS,
    "QK-norm, target-aware, text": RECIPE_VARIANTS["QK-norm, target-aware, text"],
    "QK-norm, target-aware, class": {"qk_norm": True, "target_aware": True, "n_kv_head": 2},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_codes_equal_generate(name: str, tmp_path: Path) -> None:
    gpt = export_small(tmp_path / "model", **VARIANTS[name])
    requests = Requests(gpt)
    with started(tmp_path / "model") as llm:
        requests.assert_equal(sampled(llm, requests))


@pytest.mark.parametrize("condition", ["class", "text"])
def test_an_unguided_export_has_one_branch_and_refuses_guidance(condition: str, tmp_path: Path) -> None:
    gpt = export_small(tmp_path / "model", unguided=True, condition=condition, dim=64, n_head=2)
    requests = Requests(gpt, UNGUIDED_CASES, guided=False)
    params = SamplingParams(temperature=0, extra_args={"llamagen": {"guidance_scale": 1.5}})
    with started(tmp_path / "model") as llm:
        assert llm.model_config.get_hidden_size() == 64
        requests.assert_equal(sampled(llm, requests))
        with pytest.raises(VLLMValidationError, match=r"guidance_scale is 1\.5, .* --unguided"):
            llm.generate(requests.prompts[0], params, use_tqdm=False)


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
    with started(tmp_path / "model", block_size=32, num_gpu_blocks_override=9) as llm:
        requests.assert_equal(sampled(llm, requests))
    assert len(preempted) >= 3


@pytest.fixture(scope="module")
def llm_and_gpt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, GPT]]:
    folder = tmp_path_factory.mktemp("class") / "model"
    gpt = export_small(folder, dim=64, n_head=2)
    with started(folder) as llm:
        yield llm, gpt


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"temperature": 1.0}, {}, "temperature is 1.0; set it to 0 and give"),
        ({"presence_penalty": 0.5}, {}, "presence_penalty is 0.5; leave it out"),
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
    with pytest.raises(VLLMValidationError) as caught:
        llm_and_gpt[0].generate({"prompt_token_ids": [1]}, params, use_tqdm=False)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_settings_may_be_json_and_default_to_those_of_generate(llm_and_gpt: tuple[LLM, GPT]) -> None:
    llm, gpt = llm_and_gpt
    given = [None, {"llamagen": {}}, {"llamagen": '{"seed": 7, "index": 1, "guidance_scale": 2}'}]
    params = [SamplingParams(temperature=0, max_tokens=16, extra_args=extra) for extra in given]
    outputs = llm.generate([label_prompt(gpt.config, 4)] * 3, params, use_tqdm=False)
    default = generate(gpt, [4])[0].tolist()
    guided = generate(gpt, [4], {"guidance_scale": 2}, seed=7, indices=[1])[0].tolist()
    assert [list(output.outputs[0].token_ids) for output in outputs] == [default, default, guided]
