"""The parts for vLLM's V2 model runner, with stand-ins for what surrounds them: the runner itself needs Triton."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from vllm import SamplingParams
from vllm.v1.worker.gpu.model_states import resolve_model_state_cls
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor

from llamagen.models.gpt_config import GPTConfig
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.logits import sample_codes
from llamagen.sampling.noise import code_counters, gumbel, seed_tensor
from serving.vllm.model import LlamaGenGPT
from serving.vllm.plugin import LlamaGenDefaults
from serving.vllm.processor_v2 import CodeProcessorV2, GuidedState, UnguidedCodeProcessorV2
from serving.vllm.step import step_scales
from tests.golden import normal_input
from tests.small_models import CLASS_GPT, TEXT_GPT

SETTINGS: tuple[dict[str, Any], ...] = (
    {"seed": 4, "index": 2, "guidance_scale": 3.0, "guidance_schedule": "linear", "top_k": 9},
    {"temperature": 0.0, "guidance_scale": 2.0},
    {"seed": -1, "top_p": 0.7, "temperature": 1.2},
)


@pytest.mark.parametrize("config", [CLASS_GPT, TEXT_GPT], ids=["class", "text"])
def test_a_step_of_requests_in_slots(config: GPTConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three requests in slots 5, 0 and 3, with 2, 0 and 7 codes, one of them with 4 kept codes."""
    asked: list[str] = []
    monkeypatch.setattr(DefaultModelState, "add_request", lambda *_: asked.append("add"))
    monkeypatch.setattr(DefaultModelState, "prepare_inputs", lambda *_: {"positions": 1})
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace(gpt=vars(config))))
    state = object.__new__(GuidedState)
    state.config, state.device = config, torch.device("cpu")
    state.scales, state.conditions = torch.ones(8, config.block_size), torch.ones(8, dtype=torch.int64)
    processor = CodeProcessorV2(vllm_config, SimpleNamespace(device=torch.device("cpu")))
    text = config.condition == "text"
    slots, sampled, kept = [5, 0, 3], [2, 0, 7], [4, 0, 0]
    captions = [3, 6, 1] if text else [1, 1, 1]
    for slot, settings, caption, codes in zip(slots, SETTINGS, captions, kept, strict=True):
        params = SamplingParams(temperature=0.0, extra_args={"llamagen": settings})
        tokens = [config.vocab_size] * caption + [1] * codes if text else [0, *[1] * codes]
        embedded = torch.zeros(caption, 4)
        only_embedded = text and not codes
        request = SimpleNamespace(
            sampling_params=params, prompt_token_ids=None if only_embedded else tokens, prompt_embeds=embedded
        )
        state.add_request(slot, request)
        assert processor.add_request(slot, params) is (settings.get("temperature", 1.0) > 0)
    assert asked == ["add"] * 3
    steps = [each + more for each, more in zip(sampled, kept, strict=True)]
    positions = torch.tensor([caption + step - 1 for caption, step in zip(captions, steps, strict=True)])
    mapping = torch.tensor(slots)
    batch = SimpleNamespace(expanded_idx_mapping=mapping, positions=positions, logits_indices=torch.arange(3))
    assert state.prepare_inputs(batch, None) == {"positions": 1}
    configs = [
        SamplingConfig(**{name: value for name, value in settings.items() if name not in ("seed", "index")})
        for settings in SETTINGS
    ]
    scales = [each.guidance_scales(config.block_size)[step] for each, step in zip(configs, steps, strict=True)]
    assert step_scales().rows(4, torch.device("cpu")).tolist() == pytest.approx([*scales, 1.0])
    logits = normal_input("v2/logits", (3, config.vocab_size + 1))
    logits[:, -1] = -torch.inf
    ctx = LogitsContext(
        expanded_idx_mapping=mapping,
        idx_mapping=mapping,
        idx_mapping_np=np.array(slots),
        expanded_local_pos=torch.zeros(3),
        input_ids=torch.zeros(3),
        pos=positions,
        seq_lens_upper_bound_np=np.array(positions) + 1,
    )
    found = processor.apply(logits.clone(), ctx).argmax(-1)
    for row, (settings, each) in enumerate(zip(SETTINGS, configs, strict=True)):
        seed, index = seed_tensor(settings.get("seed", 0)), torch.tensor([settings.get("index", 0)])
        noise = gumbel(seed, index, torch.tensor(steps[row]), code_counters(config.vocab_size))
        assert found[row] == sample_codes(logits[row : row + 1, :-1], each, noise)[0]
    step_scales().set(())


def test_the_runner_finds_the_parts() -> None:
    model = object.__new__(LlamaGenGPT)
    assert resolve_model_state_cls(SimpleNamespace(model_config=SimpleNamespace()), model) is GuidedState
    assert issubclass(GuidedState, DefaultModelState)
    assert issubclass(CodeProcessorV2, LogitsProcessor)


@pytest.mark.parametrize(
    ("guided", "v2", "name"),
    [
        (True, True, "serving.vllm.processor_v2:CodeProcessorV2"),
        (False, True, "serving.vllm.processor_v2:UnguidedCodeProcessorV2"),
        (True, False, "serving.vllm.processor:CodeProcessor"),
        (False, False, "serving.vllm.processor:UnguidedCodeProcessor"),
    ],
)
def test_each_runner_gets_its_own_processor(guided: bool, v2: bool, name: str) -> None:
    model_config = SimpleNamespace(hf_config=SimpleNamespace(guided=guided), logits_processors=["other:Other", name])
    vllm_config = SimpleNamespace(
        model_config=model_config,
        use_v2_model_runner=v2,
        speculative_config=None,
        lora_config=None,
        parallel_config=SimpleNamespace(pipeline_parallel_size=1),
    )
    LlamaGenDefaults.verify_and_update_config(vllm_config)
    assert model_config.logits_processors == ["other:Other", name]


def test_an_unguided_model_refuses_guidance() -> None:
    params = SamplingParams(temperature=0.0, extra_args={"llamagen": {"guidance_scale": 2}})
    with pytest.raises(ValueError, match=r"^guidance_scale is 2, but the model was exported with --unguided"):
        UnguidedCodeProcessorV2.validate_params(params)
