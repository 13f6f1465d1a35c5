"""The autoregressive model: a Llama that predicts the codes of an image after a condition (class label or caption).

Shapes: B batch, C condition tokens, L codes of an image, T tokens of this call, S tokens so far (including those of
this call), D model width, H query heads, G key-value heads, E head width, V vocabulary size.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llamagen.distributed.full_tensor import init_full_
from llamagen.losses.head_terms import HeadTerm
from llamagen.models.conditioning import CaptionEmbedder, build_conditioner, sample_dropped
from llamagen.models.dropout import Dropout
from llamagen.models.factorized_codes import (
    FactorizedEmbedding,
    SecondFactor,
    joint_log_probabilities,
    split_codes,
)
from llamagen.models.gpt_config import GPTConfig
from llamagen.models.inputs import check_codes, check_positions, check_targets
from llamagen.models.kv_cache import LAST_VECTORS, KVCache
from llamagen.models.rope import rope_table
from llamagen.models.transformer_block import AdaptiveNorm, RMSNorm, TransformerBlock, adaptive_vectors, modulate

__all__ = ["GPT", "GPTConfig", "KVCache"]


class GPT(nn.Module):
    """Llama over image codes with a class label or a caption in front (arXiv 2406.06525, section 2.2).

    State-dict names and shapes are those of the published checkpoints.

    Args:
        config: shape of the model.
    """

    rope: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self._recompute = False
        device = torch.get_default_device()
        with torch.device("meta"):  # skips PyTorch's own initialisation; reset_parameters does ours
            self.cls_embedding = build_conditioner(config)
            factors = config.code_factors
            self.tok_embeddings = (
                nn.Embedding(config.vocab_size, config.dim)
                if factors is None
                else FactorizedEmbedding(factors, config.dim)
            )
            self.tok_dropout = Dropout(config.token_dropout)
            last = max(config.n_layer - 1, 1)
            self.layers = nn.ModuleList(
                TransformerBlock(config, config.drop_path * layer / last) for layer in range(config.n_layer)
            )
            self.norm = RMSNorm(config.dim, config.norm_eps)
            self.adaptive_norm = AdaptiveNorm(config.dim, LAST_VECTORS) if config.adaptive_norm else None
            self.target_embeddings = nn.Embedding(config.block_size, config.dim) if config.target_aware else None
            self.output = nn.Linear(config.dim, config.vocab_size if factors is None else factors[0], bias=False)
            self.second_factor = None if factors is None else SecondFactor(config)
            self.register_buffer("rope", self._make_rope(self.output.weight.device), persistent=False)
        self.to_empty(device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise: normal(0, 0.02) for linear layers and embeddings, 1 for norms, 0 for heads and adaptive norms.

        With zero heads the first training loss is ln(V). The same CPU seed gives the same weights whether or not the
        parameters are sharded over ranks.
        """
        adaptive = [module.linear for module in self.modules() if isinstance(module, AdaptiveNorm)]
        for linear in adaptive:
            init_full_(linear.weight, nn.init.zeros_)
            init_full_(linear.bias, nn.init.zeros_)
        for module in self.modules():
            if module in adaptive:
                continue
            if isinstance(module, nn.Linear | nn.Embedding):
                init_full_(module.weight, partial(nn.init.normal_, std=0.02))
            elif isinstance(module, RMSNorm):
                init_full_(module.weight, nn.init.ones_)
            elif isinstance(module, CaptionEmbedder):
                module.reset_parameters()
        init_full_(self.output.weight, nn.init.zeros_)
        if self.second_factor is not None:
            init_full_(self.second_factor.output.weight, nn.init.zeros_)

    def _make_rope(self, device: torch.device) -> Tensor:
        config = self.config
        return rope_table(
            config.grid_size,
            config.head_dim,
            config.rope_base,
            config.condition_length,
            config.rope_condition,
            device,
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GPT":
        # footgun: a buffer would be rounded by `.bfloat16()` and left uninitialised by `to_empty` from the meta device.
        # So the rotary table is recomputed after every move, in float32.
        super()._apply(fn, recurse)
        self.rope = self._make_rope(self.output.weight.device)
        return self

    def checkpoint_activations(self, enabled: bool) -> None:
        """Switch activation checkpointing: keep only block inputs, and recompute the rest in the backward pass."""
        self._recompute = enabled

    def compile_blocks(self) -> None:
        """Compile each block in place. State-dict names do not change, and all blocks share one graph."""
        for block in self.layers:
            block.compile()

    def forward(
        self,
        tokens: Tensor | None,
        condition: Tensor | None = None,
        *,
        caption_lengths: Tensor | None = None,
        drop_condition: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Logits of the next code after each token; with ``code_factors``, logarithms of their probabilities.

        footgun: with ``code_factors`` this evaluates the second head V1 times for each token, and holds all V values.
        It is for scoring and tests. Training uses :meth:`features` and :meth:`head_terms`; sampling draws one factor
        after the other.

        Training and scoring: ``gpt(codes[:, :-1], condition)`` returns the logits of all L codes.
        Cached decoding: ``gpt(None, condition, cache=cache)`` once, then ``gpt(last_code, cache=cache)`` for each code.

        Args:
            tokens: (B, T) integer codes in [0, V), T from 0 to L − 1; None means T = 0.
            condition: (B,) integer labels, or (B, C, caption_dim) caption features padded on the left. Pass it in the
                first call for a sequence, and not in the later calls with the same cache.
            caption_lengths: (B,) int64 in 1 … C, number of real caption tokens, which come last; None if no caption is
                padded. Padding attends only to itself, and nothing else attends to it. With padded captions, pass it
                in every call.
            drop_condition: (B,) bool, True for examples that lose their condition. The default is random with
                probability ``condition_dropout`` in training, and False in evaluation.
            cache: keys and values of the earlier tokens; this call appends its own.
            positions: (T,) or (B, T) integers in [0, L), the position of each of ``tokens`` on the grid, counted in
                raster order. None means the next T positions. They change only the rotary embedding: attention stays
                causal in the order in which tokens are passed, so a sequence may visit the grid in any order. With a
                cache, T new tokens attend to all cached ones and causally to each other, so a draft of several codes
                needs one call.
            targets: (T,) or (B, T) integers in [0, L), with a condition (T + 1,) or (B, T + 1): the position of the
                code that each output predicts. Only for target-aware models, and required by them with ``positions``.
                None means the next position in raster order.

        Returns:
            (B, T + 1, V) with a condition, else (B, T, V): the logits after each token, the first after the condition.
            With ``code_factors`` they are float32 and normalised: the exponentials of each row sum to 1.

        Raises:
            ValueError: if there is nothing to compute; if the condition is missing, repeated or of another shape; if
                the sequence is too long; if tokens, labels or positions are not integers or (on CPUs) out of range.
        """
        hidden = self.features(
            tokens,
            condition,
            caption_lengths=caption_lengths,
            drop_condition=drop_condition,
            cache=cache,
            positions=positions,
            targets=targets,
        )
        if self.second_factor is not None:
            return joint_log_probabilities(self.output, self.second_factor, hidden)
        return cast(Tensor, self.output(hidden))

    def head_terms(self, hidden: Tensor, codes: Tensor) -> list[HeadTerm]:
        """The linear heads, each with its input and its targets: one head, or two with ``code_factors``.

        Args:
            hidden: (…, D), from :meth:`features`.
            codes: (…,) integers in [0, V), the code that each of them predicts.
        """
        if self.second_factor is None:
            return [HeadTerm(hidden, self.output, codes)]
        first, second = split_codes(codes, self.second_factor.output.out_features)
        return [
            HeadTerm(hidden, self.output, first),
            HeadTerm(self.second_factor.features(hidden, first), self.second_factor.output, second),
        ]

    def features(
        self,
        tokens: Tensor | None,
        condition: Tensor | None = None,
        *,
        caption_lengths: Tensor | None = None,
        drop_condition: Tensor | None = None,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """Normalised hidden states, the input of the head. A loss can compute logits from them in parts.

        Arguments and errors are those of :meth:`forward`.

        Returns:
            (B, T + 1, D) with a condition, else (B, T, D).
        """
        start = 0 if cache is None else cache.length
        self._check_shapes(tokens, condition, caption_lengths, start)
        check_targets(self.config.target_aware, positions, targets)
        parts: list[Tensor] = []
        embedding = None
        if condition is not None:
            if drop_condition is None and self.training and self.config.condition_dropout > 0:
                drop_condition = sample_dropped(len(condition), self.config.condition_dropout, condition.device)
            if self.config.condition == "class":
                condition = check_codes(condition, self.config.num_classes + 1, "class labels")
            parts.append(self.cls_embedding(condition, drop_condition))
            embedding = parts[0][:, 0] if self.adaptive_norm is not None else None
        if tokens is not None and tokens.shape[1] > 0:
            if cache is None:  # cached decoding passes codes that the model generated: no check at each step
                tokens = check_codes(tokens, self.config.vocab_size)
            parts.append(self.tok_embeddings(tokens))
        if not parts:
            raise ValueError("neither tokens nor a condition were passed; pass at least one of them")
        x = torch.cat(parts, dim=1)
        stop = start + x.shape[1]
        if stop >= len(self.rope):
            raise ValueError(
                f"{stop - self.config.condition_length} codes are too many: a model of block_size "
                f"{self.config.block_size} reads at most {self.config.block_size - 1} and predicts the last one"
            )
        lengths = None if cache is None else cache.row_lengths
        if positions is not None:
            rope = self._rope_at(positions, tokens, condition is not None)
        elif lengths is not None:
            rope = self.rope[lengths[:, None] + torch.arange(x.shape[1], device=x.device)]
        else:
            rope = self.rope[start:stop]
        mask = self._attention_mask(x, start, lengths, caption_lengths)
        if self.target_embeddings is not None:
            x = self._add_targets(x, targets, start if lengths is None else lengths)
        x = self.tok_dropout(x)
        for layer, block in enumerate(self.layers):
            part = None if cache is None else cache.layer(layer)
            if self._recompute and self.training and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, part, embedding, use_reentrant=False)
            else:
                x = block(x, rope, mask, part, embedding)
        if cache is not None:
            cache.advance(x.shape[1])
        if condition is not None:
            x = x[:, self.config.condition_length - 1 :]
        if self.adaptive_norm is None:
            return cast(Tensor, self.norm(x))
        cached = None if cache is None or cache.adaptive is None else cache.adaptive[-LAST_VECTORS:]
        gain, shift = adaptive_vectors(self.adaptive_norm, embedding, cached).type_as(x)
        return modulate(self.norm(x), gain, shift)

    def target_embedding(self, targets: Tensor) -> Tensor | None:
        """Embeddings of the positions that are predicted next, (…,) → (…, D); None unless the model is target-aware.

        Engines add them to the embeddings of the codes before these positions, and to that of the last condition token.
        """
        return None if self.target_embeddings is None else cast(Tensor, self.target_embeddings(targets))

    def all_adaptive_vectors(self, embedding: Tensor) -> Tensor | None:
        """Vectors of all adaptive norms for class embeddings (B, D), as :attr:`KVCache.adaptive` holds them.

        Returns:
            (6 N + 2, B, D); None without adaptive norms.
        """
        if self.adaptive_norm is None:
            return None
        norms = [block.adaptive_norm for block in cast(Iterable[TransformerBlock], self.layers)]
        return torch.cat([norm(embedding) for norm in (*norms, self.adaptive_norm) if norm is not None])

    def _add_targets(self, x: Tensor, targets: Tensor | None, start: int | Tensor) -> Tensor:
        """Add the embedding of its target to each input (B, T, D) that predicts a code.

        Args:
            x: embedded tokens.
            targets: see :meth:`forward`.
            start: number of cached tokens; of each row, (B,), if rows differ.
        """
        assert self.target_embeddings is not None
        first = self.config.condition_length - 1
        skipped = first if isinstance(start, int) and start == 0 else 0  # tokens of the condition that predict nothing
        if targets is None:
            places = torch.arange(skipped, x.shape[1], device=x.device)
            targets = places + start - first if isinstance(start, int) else places + start[:, None] - first
        else:
            targets = check_positions(targets, x[:, skipped:, 0], self.config.block_size, "targets")
        embedded = self.target_embeddings(targets).expand(len(x), -1, -1)
        return torch.cat([x[:, :skipped], x[:, skipped:] + embedded], dim=1) if skipped else x + embedded

    def _rope_at(self, positions: Tensor, tokens: Tensor | None, with_condition: bool) -> Tensor:
        """Rows of the rotary table for the condition, if any, and for codes at the given positions.

        Returns:
            (T, E / 2, 2) or (B, T, E / 2, 2), with C more rows for a condition.
        """
        first = self.config.condition_length
        rope = self.rope[first + check_positions(positions, tokens, self.config.block_size)]
        if not with_condition:
            return rope
        return torch.cat([self.rope[:first].expand(*rope.shape[:-3], -1, -1, -1), rope], dim=-3)

    def _check_shapes(
        self, tokens: Tensor | None, condition: Tensor | None, caption_lengths: Tensor | None, start: int
    ) -> None:
        if (condition is None) != (start > 0):
            raise ValueError(
                "pass the condition in the first call for a sequence, and in no other: "
                f"it is {'missing' if condition is None else 'repeated'} at position {start}"
            )
        if condition is not None and self.config.condition == "class" and condition.dim() != 1:
            raise ValueError(f"class labels must have shape (B,), not {tuple(condition.shape)}")
        features = (self.config.caption_length, self.config.caption_dim)
        if condition is not None and self.config.condition == "text":
            if condition.shape[1:] != features:
                raise ValueError(
                    f"caption features must have shape (B, {features[0]}, {features[1]}), not {tuple(condition.shape)}"
                )
            if not condition.is_floating_point():
                raise ValueError(f"caption features must be floats, not {condition.dtype}")
        rows = next((len(given) for given in (condition, tokens) if given is not None), 0)
        if tokens is not None and (tokens.dim() != 2 or len(tokens) != rows):
            raise ValueError(f"tokens must have shape ({rows}, T), not {tuple(tokens.shape)}")
        if caption_lengths is not None and (self.config.condition == "class" or caption_lengths.shape != (rows,)):
            raise ValueError(
                f"caption_lengths must have shape ({rows},) and belongs to a text-conditional model; it has shape "
                f"{tuple(caption_lengths.shape)} and the model's condition is {self.config.condition!r}"
            )

    def _attention_mask(
        self, x: Tensor, start: int, row_lengths: Tensor | None, caption_lengths: Tensor | None
    ) -> Tensor | None:
        """Causal and padding mask (B or 1, 1, T, S), or None if the causal mask of :class:`Attention` is enough."""
        span = x.shape[1]
        if caption_lengths is None and row_lengths is None and (start == 0 or span == 1):
            return None
        first = torch.full((1,), start, device=x.device) if row_lengths is None else row_lengths
        query = (first[:, None] + torch.arange(span, device=x.device))[:, :, None]
        key = torch.arange(start + span, device=x.device)
        causal = key <= query
        if caption_lengths is None:
            return causal[:, None]
        real = key >= self.config.condition_length - caption_lengths[:, None]
        return (causal & (real[:, None, :] | (key == query)))[:, None]
