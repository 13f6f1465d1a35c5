"""A Llama of transformers with the shape of a GPT, which generates the same number of codes."""

from typing import Any

import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.sampling import SamplingConfig


class Peer:
    """A Llama with random weights, with the GPT's shape and dtype. It starts from a token instead of a class.

    Args:
        gpt: the model with the shape to copy.
        config: guidance and top-k.

    Raises:
        ImportError: without transformers, with the command that installs it.
    """

    def __init__(self, gpt: GPT, config: SamplingConfig) -> None:
        try:
            from transformers import LlamaConfig, LlamaForCausalLM
        except ImportError as error:
            raise ImportError('the peer needs transformers; pip install -e ".[benchmark]"') from error
        shape = gpt.config
        layout = LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.dim,
            intermediate_size=shape.ffn_dim,
            num_hidden_layers=shape.n_layer,
            num_attention_heads=shape.n_head,
            num_key_value_heads=shape.kv_heads,
            max_position_embeddings=shape.block_size + 1,
        )
        weight = gpt.output.weight
        with torch.device(weight.device):
            llama: Any = LlamaForCausalLM(layout)
        self.llama = llama.to(weight.dtype).eval()
        self.config, self.length = config, shape.block_size
        self.llama.generation_config.eos_token_id = None
        self.llama.generation_config.pad_token_id = 0

    @torch.no_grad()
    def one_batch(self, labels: Tensor) -> Tensor:
        """Generate with both branches in one batch, the faster way. Each samples its own codes, at the same cost."""
        start = torch.cat([labels, labels + 1000])[:, None]

        def guided(ids: Tensor, logits: Tensor) -> Tensor:
            conditional, unconditional = logits.chunk(2)
            logits = unconditional + self.config.guidance_scale * (conditional - unconditional)
            return torch.cat([logits, logits])

        return self._generate(start, logits_processor=[guided])

    @torch.no_grad()
    def two_passes(self, labels: Tensor) -> Tensor:
        """Generate with the guidance of ``generate``, which runs the branches one after the other."""
        without = torch.full_like(labels, 1000)[:, None]
        return self._generate(labels[:, None], guidance_scale=self.config.guidance_scale, negative_prompt_ids=without)

    def _generate(self, start: Tensor, **options: Any) -> Tensor:
        codes: Tensor = self.llama.generate(
            start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=self.length,
            do_sample=True,
            top_k=self.config.top_k,
            **options,
        )
        assert codes.shape[1] == 1 + self.length
        return codes
