"""The autoregressive model in vLLM's layers.

Guidance needs the model twice at each position, with another first embedding. Both branches see the same codes at the
same positions, so for vLLM they are one sequence with twice as many heads. No pairs of requests have to be scheduled
together, and preemption and prefix caching need no care.

Shapes: T tokens of a step, N branches (2: conditional, unconditional; or 1), D model width, H query heads, G key-value
heads, E head width, P head width in the cache, R rows of logits, V codes.
"""

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors

from llamagen.finite import not_finite
from llamagen.models.gpt_config import GPTConfig
from llamagen.models.rope import rope_table, rotate
from serving.vllm.prompts import condition_tokens
from serving.vllm.step import step_scales


class GuidedAttention(nn.Module):
    """Attention over the heads of all branches."""

    def __init__(self, config: GPTConfig, branches: int, padded: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        quantization, ranks = vllm_config.quant_config, get_tensor_model_parallel_world_size()
        if config.n_head % ranks:
            raise ValueError(f"tensor_parallel_size is {ranks}; it must divide the model's {config.n_head} heads")
        self.branches, self.width, self.padded = branches, config.head_dim, padded
        self.heads, self.kv_heads = config.n_head // ranks, max(1, config.kv_heads // ranks)
        self.wqkv = QKVParallelLinear(
            config.dim,
            config.head_dim,
            config.n_head,
            config.kv_heads,
            bias=False,
            quant_config=quantization,
            prefix=f"{prefix}.wqkv",
        )
        self.q_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else None
        self.wo = RowParallelLinear(
            config.dim, config.dim, bias=False, quant_config=quantization, prefix=f"{prefix}.wo"
        )
        self.attn = Attention(
            branches * self.heads,
            padded,
            config.head_dim**-0.5,
            num_kv_heads=branches * self.kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=quantization,
            prefix=f"{prefix}.attn",
        )

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """(T N, D), the branches of a token next to each other, and rope (T N, E / 2, 2) → (T N, D)."""
        qkv, _ = self.wqkv(x)
        widths = [self.heads * self.width, self.kv_heads * self.width, self.kv_heads * self.width]
        q, k, v = (part.unflatten(-1, (-1, self.width)) for part in qkv.split(widths, dim=-1))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q.contiguous()), self.k_norm(k.contiguous())
        q, k = rotate(q, rope), rotate(k, rope)
        if self.padded != self.width:  # zeros change neither products nor sums
            q, k, v = (nn.functional.pad(part, (0, self.padded - self.width)) for part in (q, k, v))
        tokens = x.shape[0] // self.branches
        attended = self.attn(*(part.reshape(tokens, -1) for part in (q, k, v)))
        attended = attended.reshape(x.shape[0], self.heads, self.padded)[..., : self.width]
        out: Tensor = self.wo(attended.reshape(x.shape[0], -1))[0]
        return out


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: GPTConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        quantization = vllm_config.quant_config
        self.w13 = MergedColumnParallelLinear(
            config.dim, [config.ffn_dim] * 2, bias=False, quant_config=quantization, prefix=f"{prefix}.w13"
        )
        self.w2 = RowParallelLinear(
            config.ffn_dim, config.dim, bias=False, quant_config=quantization, prefix=f"{prefix}.w2"
        )
        self.activation = SiluAndMul()

    def forward(self, x: Tensor) -> Tensor:
        """(T N, D) → (T N, D)."""
        out: Tensor = self.w2(self.activation(self.w13(x)[0]))[0]
        return out


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection."""

    def __init__(self, config: GPTConfig, branches: int, padded: int, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.attention = GuidedAttention(config, branches, padded, vllm_config, f"{prefix}.attention")
        self.feed_forward = FeedForward(config, vllm_config, f"{prefix}.feed_forward")
        self.attention_norm = RMSNorm(config.dim, eps=config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, eps=config.norm_eps)

    def forward(self, x: Tensor, residual: Tensor | None, rope: Tensor) -> tuple[Tensor, Tensor]:
        """(T N, D) and the residual stream, which the norms of vLLM add to → the same, one block later."""
        if residual is None:
            residual, x = x, self.attention_norm(x)
        else:
            x, residual = self.attention_norm(x, residual)
        x, residual = self.ffn_norm(self.attention(x, rope), residual)
        return self.feed_forward(x), residual


@support_torch_compile(dynamic_arg_dims={"x": 0, "positions": -1})
class Backbone(nn.Module):
    """The blocks, which vLLM compiles."""

    rope: Tensor

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        hf_config = vllm_config.model_config.hf_config
        config = GPTConfig(**hf_config.gpt)
        self.branches, self.dim = 2 if hf_config.guided else 1, config.dim
        self.layers = nn.ModuleList(
            Block(config, self.branches, hf_config.head_dim, vllm_config, f"{prefix}.layers.{layer}")
            for layer in range(config.n_layer)
        )
        self.norm = RMSNorm(config.dim, eps=config.norm_eps)
        # footgun: vLLM builds models in their dtype, in which the table would be rounded.
        rope = rope_table(
            config.grid_size, config.head_dim, config.rope_base, config.condition_length, config.rope_condition
        )
        self.register_buffer("rope", rope.float(), persistent=False)
        self.positions = len(rope)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """(T, N D) and positions (T,) → (T, N D), normalised."""
        tokens = x.shape[0]
        rope = self.rope[positions.repeat_interleave(self.branches) if self.branches > 1 else positions]
        x, residual = x.reshape(tokens * self.branches, self.dim), None
        for block in self.layers:
            x, residual = block(x, residual, rope)
        x, _ = self.norm(x, residual)
        return x.reshape(tokens, -1)


class LlamaGenGPT(nn.Module, SupportsMRoPE):
    """The model. :mod:`serving.vllm.prompts` describes its prompts.

    Args:
        vllm_config: vLLM's configuration; ``hf_config`` is a :class:`~serving.vllm.hf_config.LlamaGenConfig`.
        prefix: prefix of the names of its layers.
    """

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {"w13": ["w1", "w3"]}
    allow_patterns_overrides: ClassVar[list[str]] = ["model.safetensors"]
    """Files that vLLM loads: not ``tokenizer.safetensors``, which is in the same folder."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        hf_config = vllm_config.model_config.hf_config
        self.config, self.branches = GPTConfig(**hf_config.gpt), 2 if hf_config.guided else 1
        self.tok_embeddings = VocabParallelEmbedding(self.config.vocab_size, self.config.dim)
        self.has_labels = self.config.condition == "class"
        if self.has_labels:
            self.label_embeddings = nn.Embedding(self.config.num_classes + 1, self.config.dim)
        self.target_embeddings = None
        if self.config.target_aware:
            self.target_embeddings = nn.Embedding(self.config.block_size, self.config.dim)
        self.backbone = Backbone(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "backbone"))
        self.output = ParallelLMHead(self.config.vocab_size, self.config.dim, prefix=maybe_prefix(prefix, "output"))
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Codes (T,), the same in all branches → (T, N D). Other tokens are embedded elsewhere."""
        embedded: Tensor = self.tok_embeddings(input_ids.clamp(0, self.config.vocab_size - 1))
        return embedded.repeat(1, self.branches)

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: object) -> tuple[Tensor, int]:
        """Positions (3, T) of the tokens of a prompt, and how far the positions of later tokens are shifted.

        A caption without its padding ends where the padded one does.
        """
        caption = condition_tokens(self.config, input_tokens, len(input_tokens))
        missing = self.config.condition_length - caption
        return torch.arange(missing, missing + len(input_tokens)).expand(3, -1), missing

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Tokens (T,), or their embeddings (T, N D) for text models; positions (T,) or (3, T) → (T, N D)."""
        if positions.dim() == 2:
            positions = positions[0]  # the three of M-RoPE are equal
        if inputs_embeds is not None:
            x = inputs_embeds
        else:
            assert input_ids is not None
            x = self.embed_input_ids(input_ids)
            if self.has_labels:
                x = torch.where((positions == 0)[:, None], self._embed_labels(input_ids), x)
        if self.target_embeddings is not None:
            x = x + self._embed_targets(positions)
        # Only warm-up has positions beyond the last code.
        hidden: Tensor = self.backbone(x, positions.clamp(max=self.backbone.positions - 1))
        return hidden

    def _embed_labels(self, labels: Tensor) -> Tensor:
        """(T,) → (T, N D). footgun: vLLM does not check token ids; labels out of range become "no class"."""
        conditional: Tensor = self.label_embeddings(labels.clamp(0, self.config.num_classes))
        if self.branches == 1:
            return conditional
        return torch.cat([conditional, self.label_embeddings.weight[-1].expand_as(conditional)], dim=-1)

    def _embed_targets(self, positions: Tensor) -> Tensor:
        """Embeddings of the codes that tokens at positions (T,) predict → (T, N D); 0 for those that predict none."""
        assert self.target_embeddings is not None
        targets = positions - (self.config.condition_length - 1)
        embedded: Tensor = self.target_embeddings(targets.clamp(0, self.config.block_size - 1))
        return embedded.masked_fill((targets < 0)[:, None], 0.0).repeat(1, self.branches)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """(R, N D) → (R, V + 1) guided logits; None on ranks that do not sample.

        The head is linear, so guiding its input is guiding the logits, at half the cost. The last column is the token
        V, which is chosen only if some logits are not finite; see :func:`~serving.vllm.hf_config.not_finite_code`.
        """
        if self.branches > 1:
            conditional, unconditional = hidden_states.float().chunk(2, dim=-1)
            scale = step_scales().rows(len(hidden_states), hidden_states.device)[:, None]
            guided = torch.where(scale == 1.0, conditional, unconditional + scale * (conditional - unconditional))
            hidden_states = guided.to(hidden_states.dtype)
        logits: Tensor | None = self.logits_processor(self.output, hidden_states)
        if logits is None:
            return None
        broken = not_finite(logits)[:, None]
        last = torch.where(broken, 0.0, -torch.inf).to(logits.dtype)
        return torch.cat([logits.masked_fill(broken, -torch.inf), last], dim=-1)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the weights of ``model.safetensors``; returns the names of the parameters that were loaded."""
        parameters, loaded = dict(self.named_parameters()), set()
        for name, weight in weights:
            target, shard = _target(name)
            if target is None or (target == "label_embeddings.weight" and not self.has_labels):
                continue
            parameter = parameters[target]
            loader = getattr(parameter, "weight_loader", default_weight_loader)
            loader(parameter, weight) if shard is None else loader(parameter, weight, shard)
            loaded.add(target)
        return loaded

    @staticmethod
    def get_model_state_cls() -> type:
        """The state that the V2 model runner keeps for this model."""
        from serving.vllm.processor_v2 import GuidedState

        return GuidedState


def _target(name: str) -> tuple[str | None, int | None]:
    """Parameter of a weight, and which part of it; None for weights that are used before the engine."""
    if name.startswith("cls_embedding."):
        return ("label_embeddings.weight" if name == "cls_embedding.embedding_table.weight" else None), None
    if name.startswith(("layers.", "norm.")):
        name = f"backbone.{name}"
    for shard, part in enumerate(("w1", "w3")):
        if f".feed_forward.{part}." in name:
            return name.replace(f".{part}.", ".w13."), shard
    return name, None
