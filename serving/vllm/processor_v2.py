"""The same as :mod:`serving.vllm.processor` for vLLM's V2 model runner, the default on GPUs.

Written for the interfaces of vLLM 0.32 and tested with stand-ins for what surrounds it: the runner needs Triton, which
does not compile for CPUs.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.mm.encoder_cache import EncoderCache
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext, LogitsProcessor, LogitsProcRequestState
from vllm.v1.worker.gpu.states import RequestState

from llamagen.models.gpt_config import GPTConfig
from llamagen.sampling.noise import code_counters
from serving.vllm.processor import check_params
from serving.vllm.prompts import condition_tokens
from serving.vllm.settings import RequestSettings
from serving.vllm.step import Row, add_noise, step_scales


class GuidedState(DefaultModelState):
    """Keeps the guidance scales and the length of the condition of each request slot (S slots).

    Args:
        vllm_config: vLLM's configuration.
        model: the model.
        encoder_cache: not used.
        device: device of the model.
    """

    def __init__(
        self, vllm_config: VllmConfig, model: nn.Module, encoder_cache: EncoderCache | None, device: torch.device
    ) -> None:
        super().__init__(vllm_config, model, encoder_cache, device)
        self.config = GPTConfig(**vllm_config.model_config.hf_config.gpt)
        self.scales = torch.ones(self.max_num_reqs, self.config.block_size, device=device)
        self.conditions = torch.ones(self.max_num_reqs, dtype=torch.int64, device=device)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Remember a request in its slot. A request that was preempted comes again, with the same prompt."""
        super().add_request(req_index, new_req_data)
        settings = RequestSettings.from_extra_args(new_req_data.sampling_params.extra_args)
        scales = settings.sampling.guidance_scales(self.config.block_size)
        self.scales[req_index] = torch.tensor(scales, device=self.device)
        tokens, embeddings = new_req_data.prompt_token_ids, new_req_data.prompt_embeds
        length = len(embeddings) if tokens is None else len(tokens)
        self.conditions[req_index] = condition_tokens(self.config, tokens, length)

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        """Set the scale of each row of logits; the model reads it outside of CUDA graphs."""
        slots = input_batch.expanded_idx_mapping
        steps = input_batch.positions[input_batch.logits_indices] + 1 - self.conditions[slots]
        step_scales().set(self.scales[slots, steps.clamp(0, self.config.block_size - 1)])
        step_scales().conditions = self.conditions
        inputs: dict[str, Any] = super().prepare_inputs(input_batch, req_states)
        return inputs


class CodeProcessorV2(LogitsProcessor):
    """Adds the noise of each request to its logits.

    Args:
        vllm_config: vLLM's configuration.
        req_states: vLLM's state of the request slots.
    """

    guided: ClassVar[bool] = True

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Check the parameters of a request."""
        check_params(sampling_params, cls.guided)

    def __init__(self, vllm_config: VllmConfig, req_states: LogitsProcRequestState) -> None:
        super().__init__(vllm_config, req_states)
        self.config = GPTConfig(**vllm_config.model_config.hf_config.gpt)
        self.counters = code_counters(self.config.vocab_size, req_states.device)
        self.slots: dict[int, Row] = {}

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Remember a request in its slot; returns whether its logits change."""
        settings = RequestSettings.from_extra_args(sampling_params.extra_args)
        self.slots[req_idx] = Row(settings, self.config.block_size)
        return settings.sampling.temperature > 0.0

    def apply(self, logits: Tensor, ctx: LogitsContext) -> Tensor:
        """(R, W) float32 logits → logits with noise. Without speculative decoding a request has one row."""
        rows = {row: self.slots[slot] for row, slot in enumerate(ctx.idx_mapping_np.tolist()) if slot in self.slots}
        steps = ctx.pos + 1 - step_scales().conditions[ctx.expanded_idx_mapping]
        return add_noise(logits, rows, steps, self.counters)


class UnguidedCodeProcessorV2(CodeProcessorV2):
    """For models exported with ``--unguided``: refuses guidance."""

    guided = False
