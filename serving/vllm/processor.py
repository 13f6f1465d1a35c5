"""Samples codes as :func:`~llamagen.sampling.generate` does, in vLLM's V1 model runner.

vLLM then takes the largest logit (its own temperature is 0).
"""

from typing import ClassVar

import torch
from torch import Tensor
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality

from llamagen.models.gpt_config import GPTConfig
from llamagen.sampling.noise import code_counters
from serving.vllm.prompts import kept_count
from serving.vllm.settings import RequestSettings, check_guidance, check_vllm_parameters
from serving.vllm.step import Row, add_noise, step_scales


def check_params(params: SamplingParams, guided: bool) -> None:
    """Check the parameters of a request, when it arrives; over HTTP an error is status 400.

    Args:
        params: the parameters.
        guided: whether the model has the unconditional branch.

    Raises:
        ValueError: in one line, if they are invalid.
    """
    filters = {
        "presence_penalty": (params.presence_penalty, 0.0),
        "frequency_penalty": (params.frequency_penalty, 0.0),
        "repetition_penalty": (params.repetition_penalty, 1.0),
        "logit_bias": (params.logit_bias or None, None),
        "allowed_token_ids": (params.allowed_token_ids or None, None),
        "bad_words": (params.bad_words or None, None),
        "structured_outputs": (params.structured_outputs, None),
    }
    check_guidance(RequestSettings.from_extra_args(params.extra_args), guided)
    check_vllm_parameters(params.temperature, filters)


class CodeProcessor(LogitsProcessor):
    """Adds the noise of each request to its logits, and tells the model the guidance scale of each.

    Args:
        vllm_config: vLLM's configuration.
        device: device of the logits.
        is_pin_memory: not used.
    """

    guided: ClassVar[bool] = True

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Check the parameters of a request."""
        check_params(sampling_params, cls.guided)

    def __init__(self, vllm_config: VllmConfig, device: torch.device, is_pin_memory: bool) -> None:
        self.config = GPTConfig(**vllm_config.model_config.hf_config.gpt)
        self.counters = code_counters(self.config.vocab_size, device)
        self.rows: dict[int, Row] = {}
        self.kept: dict[int, int] = {}
        self.codes: dict[int, list[int]] = {}

    def is_argmax_invariant(self) -> bool:
        """False: it changes which logit is the largest."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow the requests in the batch; called before each step."""
        if batch_update is not None:
            for row in batch_update.removed:
                self._pop(row)
            for row, params, prompt, codes in batch_update.added:
                settings = RequestSettings.from_extra_args(params.extra_args)
                self._put(row, (Row(settings, self.config.block_size), kept_count(self.config, prompt), codes))
            for source, target, direction in batch_update.moved:
                moved, other = self._pop(source), self._pop(target)
                if moved is not None:
                    self._put(target, moved)
                if direction == MoveDirectionality.SWAP and other is not None:
                    self._put(source, other)
        steps, count = self._steps(), max(self.rows, default=-1) + 1
        step_scales().set([self.rows[row].scale(steps[row]) if row in self.rows else 1.0 for row in range(count)])

    def apply(self, logits: Tensor) -> Tensor:
        """(R, W) float32 logits → logits with noise."""
        return add_noise(logits, self.rows, self._steps(), self.counters)

    def _steps(self) -> dict[int, int]:
        # footgun: vLLM appends to the list of codes, with placeholders while they are still computed on a GPU. Its
        # length is right, its content may not be.
        return {row: self.kept[row] + len(codes) for row, codes in self.codes.items()}

    def _pop(self, row: int) -> tuple[Row, int, list[int]] | None:
        if row not in self.rows:
            return None
        return self.rows.pop(row), self.kept.pop(row), self.codes.pop(row)

    def _put(self, row: int, state: tuple[Row, int, list[int]]) -> None:
        self.rows[row], self.kept[row], self.codes[row] = state


class UnguidedCodeProcessor(CodeProcessor):
    """For models exported with ``--unguided``: refuses guidance."""

    guided = False
