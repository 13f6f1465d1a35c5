"""The plain training step that ours is compared with: eager, all logits at once, an unfused optimizer.

A straightforward implementation of the paper, with the parameter names of the published checkpoints.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llamagen.models.gpt import GPT, GPTConfig
from llamagen.models.rope import rope_table


def linears(**shapes: tuple[int, int]) -> nn.ModuleDict:
    """Layers without bias by name."""
    return nn.ModuleDict({name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()})


class PlainBlock(nn.Module):
    """Attention and SwiGLU, each after a norm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        dim, ffn = config.dim, config.ffn_dim
        self.attention = linears(wqkv=(dim, 3 * dim), wo=(dim, dim))
        self.feed_forward = linears(w1=(dim, ffn), w3=(dim, ffn), w2=(ffn, dim))
        self.attention_norm, self.ffn_norm = PlainNorm(config), PlainNorm(config)

    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        heads, dropout = self.config.n_head, self.config.resid_dropout
        q, k, v = self.attention["wqkv"](self.attention_norm(x)).chunk(3, dim=-1)
        q, k, v = (part.view(*part.shape[:2], heads, -1) for part in (q, k, v))
        q, k = (rotate(part, rope).transpose(1, 2) for part in (q, k))
        y = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True).transpose(1, 2).flatten(2)
        x = x + F.dropout(self.attention["wo"](y), dropout)
        y, ffn = self.ffn_norm(x), self.feed_forward
        return x + F.dropout(ffn["w2"](F.silu(ffn["w1"](y)) * ffn["w3"](y)), self.config.ffn_dropout)


class PlainNorm(nn.Module):
    """RMSNorm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.eps, self.weight = config.norm_eps, nn.Parameter(torch.ones(config.dim))

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        norm = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)
        return norm.type_as(x) * self.weight


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate pairs of (B, L, H, E) as complex numbers."""
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * rope[:, None]).flatten(3).type_as(x)


class PlainGPT(nn.Module):
    """A class-conditional model."""

    rope: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.cls_embedding = nn.ModuleDict({"embedding_table": nn.Embedding(config.num_classes + 1, config.dim)})
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.norm = PlainNorm(config)
        self.output = nn.Linear(config.dim, config.vocab_size, bias=False)
        table = rope_table(config.grid_size, config.head_dim, config.rope_base, 1, config.rope_condition)
        self.register_buffer("rope", torch.view_as_complex(table), persistent=False)

    def forward(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Codes (B, L) and labels (B,) → logits (B, L, V)."""
        dropped = torch.rand(len(labels), device=labels.device) < self.config.condition_dropout
        labels = torch.where(dropped, self.config.num_classes, labels)
        condition = self.cls_embedding["embedding_table"](labels)[:, None]
        x = torch.cat([condition, self.tok_embeddings(codes[:, :-1])], dim=1)
        x = F.dropout(x, self.config.token_dropout)
        for layer in self.layers:
            x = layer(x, self.rope[: x.shape[1]])
        logits: Tensor = self.output(self.norm(x))
        return logits


class PlainStep:
    """A training step with the weights of a model: clipping, AdamW with decay on matrices, EMA.

    Args:
        gpt: its weights are copied.
    """

    def __init__(self, gpt: GPT) -> None:
        self.gpt = PlainGPT(gpt.config).to(gpt.output.weight.device)
        self.gpt.load_state_dict(gpt.state_dict())
        self.average = copy.deepcopy(self.gpt).requires_grad_(False)
        matrices = [p for p in self.gpt.parameters() if p.dim() >= 2]
        others = [p for p in self.gpt.parameters() if p.dim() < 2]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), foreach=False, fused=False)

    def __call__(self, codes: Tensor, labels: Tensor, autocast: torch.autocast) -> float:
        """Do one step and return its loss."""
        with autocast:
            logits = self.gpt(codes, labels)
            loss = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.gpt.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for average, parameter in zip(self.average.parameters(), self.gpt.parameters(), strict=True):
                average.mul_(0.9999).add_(parameter, alpha=1e-4)
        return loss.item()
