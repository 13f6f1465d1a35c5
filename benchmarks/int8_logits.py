"""Effect of int8 weights on the logits and the loss of a trained GPT on validation codes, compared with bfloat16.

    python -m benchmarks.int8_logits runs/quickstart/argen/checkpoints/last.ckpt runs/quickstart/codes

Prints a table, then a line of JSON. ``sampled alike`` is the share of positions at which the same noise would sample
the same code.
"""

import argparse
import copy
import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules import CodeDataModule
from llamagen.checkpoints.contents import build_model
from llamagen.checkpoints.weights import read_weights
from llamagen.models.gpt import GPT
from llamagen.sampling import SamplingConfig, code_counters, gumbel, sample_codes, seed_tensor
from llamagen.sampling.decode_weights import DecodeWeights


@torch.no_grad()
def rounded(gpt: GPT) -> GPT:
    """A copy of the model with its matrices rounded to int8 and back."""
    gpt = copy.deepcopy(gpt)
    weights = DecodeWeights.from_gpt(gpt, torch.float32, int8=True)
    for block, layer in zip(gpt.layers, weights.layers, strict=True):
        linears: Any = (block.attention, block.feed_forward)
        for module, name in ((0, "wqkv"), (0, "wo"), (1, "w1"), (1, "w3"), (1, "w2")):
            matrix = getattr(layer, name)
            getattr(linears[module], name).weight.copy_(matrix.values * matrix.scale[:, None])
    head = weights.head
    gpt.output.weight.copy_(head.values * cast(Tensor, head.scale)[:, None])
    return gpt


@torch.no_grad()
def compare(gpt: GPT, other: GPT, batches: list[dict[str, Any]]) -> dict[str, float]:
    """Differences between two models, as means over all codes."""
    sums = dict.fromkeys(("logit change", "KL divergence", "loss", "sampled alike"), 0.0)
    spread, count = 0.0, 0
    counters = code_counters(gpt.config.vocab_size)
    for number, batch in enumerate(batches):
        codes = batch["codes"]
        true = gpt(codes[:, :-1], batch["condition"]).flatten(0, 1)
        found = other(codes[:, :-1], batch["condition"]).flatten(0, 1).float()
        noise = gumbel(seed_tensor(0), torch.arange(len(true)), torch.tensor(number), counters)
        one, two = (sample_codes(logits, SamplingConfig(), noise) for logits in (true, found))
        sums["logit change"] += float((found - true).square().mean(1).sqrt().sum())
        kl = F.kl_div(found.log_softmax(-1), true.log_softmax(-1), log_target=True, reduction="sum")
        sums["KL divergence"] += float(kl)
        sums["loss"] += float(F.cross_entropy(found, codes.flatten(), reduction="sum"))
        sums["sampled alike"] += float((one == two).sum())
        spread += float(true.std(1).sum())
        count += len(true)
    return {name: round(total / count, 6) for name, total in sums.items()} | {"spread": round(spread / count, 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("codes", type=Path)
    options = parser.parse_args()
    try:
        gpt = build_model(read_weights(options.checkpoint)).eval()
        data = CodeDataModule(options.codes, batch_size=100, num_workers=0)
        data.setup("validate")
    except ValueError as error:
        parser.error(str(error))
    if not isinstance(gpt, GPT):
        parser.error(f"{options.checkpoint} holds a tokenizer; give the weights of an autoregressive model")
    batches = list(data.val_dataloader())
    others = {"float32": gpt, "bfloat16": copy.deepcopy(gpt).bfloat16(), "int8": rounded(gpt)}
    result = {name: compare(gpt, other, batches) for name, other in others.items()}
    print(f"{'weights':10}" + "".join(f"{name:>16}" for name in result["int8"]))
    for name, numbers in result.items():
        print(f"{name:10}" + "".join(f"{value:16.6f}" for value in numbers.values()))
    print(
        "\n"
        + json.dumps({"benchmark": "int8_logits", "parameters": sum(p.numel() for p in gpt.parameters()), **result})
    )


if __name__ == "__main__":
    main()
