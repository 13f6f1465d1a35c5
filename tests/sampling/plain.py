"""Sampling without a cache: a pass over the whole sequence for each code and each branch."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.sampling import SamplingConfig, code_counters, gumbel, sample_codes, seed_tensor

SAMPLED = {"temperature": 0.9, "top_k": 30, "top_p": 0.95}
SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, guided": {"temperature": 0.0, "guidance_scale": 3.0},
    "greedy, guided for 5 codes": {"temperature": 0.0, "guidance_scale": 3.0, "guidance_steps": 5},
    "sampled": SAMPLED,
    "sampled, guided": {**SAMPLED, "guidance_scale": 2.0},
    "sampled, guided for 1 code": {**SAMPLED, "guidance_scale": 4.0, "guidance_steps": 1},
    "sampled, guided for no code": {**SAMPLED, "guidance_scale": 4.0, "guidance_steps": 0},
    "sampled, guided for more codes than there are": {**SAMPLED, "guidance_scale": 2.0, "guidance_steps": 99},
    "sampled, without the condition": {**SAMPLED, "guidance_scale": 0.0},
    "sampled, guided from code 3 to 9": {**SAMPLED, "guidance_scale": 4.0, "guidance_start": 3, "guidance_steps": 9},
    "sampled, linear": {**SAMPLED, "guidance_scale": 4.0, "guidance_schedule": "linear"},
    "greedy, cosine": {"temperature": 0.0, "guidance_scale": 4.0, "guidance_schedule": "cosine"},
    "sampled, power cosine": {
        **SAMPLED,
        "guidance_scale": 4.0,
        "guidance_schedule": "power_cosine",
        "guidance_power": 2,
    },
    "sampled by top-k alone": {"top_k": 9, "guidance_scale": 2.0},
    "sampled by top-p alone": {"top_p": 0.7, "guidance_scale": 2.0},
    "sampled from all codes": {"temperature": 1.3, "guidance_scale": 2.0},
}


@torch.no_grad()
def plain_loop(
    gpt: GPT,
    condition: Tensor,
    config: SamplingConfig,
    lengths: Tensor | None,
    seed: int,
    indices: Tensor,
    kept: Tensor | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """Codes (B, L) of a model in evaluation mode, the first of which may be given as ``kept`` (B, K).

    With ``order`` (B, L) they are generated, given and returned in that order.
    """
    batch = len(condition)
    codes = torch.empty(batch, 0, dtype=torch.int64) if kept is None else kept
    for step in range(codes.shape[1], gpt.config.block_size):
        places = {} if order is None else {"positions": order[:, :step], "targets": order[:, : step + 1]}
        logits = gpt(codes, condition, caption_lengths=lengths, **places)[:, -1]
        dropped, scale = torch.ones(batch, dtype=torch.bool), config.guidance_scales(gpt.config.block_size)[step]
        other = gpt(codes, condition, caption_lengths=lengths, drop_condition=dropped, **places)[:, -1]
        factors, noise_of = gpt.config.code_factors, partial(gumbel, seed_tensor(seed), indices, torch.tensor(step))
        counters = code_counters(gpt.config.vocab_size if factors is None else sum(factors))
        if factors is None:
            code = sample_codes(scale * logits + (1 - scale) * other, config, noise_of(counters))
        else:  # one factor after the other, each with its own noise
            joint, other = logits.unflatten(1, factors), other.unflatten(1, factors)
            first = sample_codes(
                scale * joint.logsumexp(2) + (1 - scale) * other.logsumexp(2), config, noise_of(counters[: factors[0]])
            )
            rows = torch.arange(batch), first
            second = scale * joint[rows] + (1 - scale) * other[rows]
            code = first * factors[1] + sample_codes(second, config, noise_of(counters[factors[0] :]))
        codes = torch.cat([codes, code[:, None]], dim=1)
    return codes
