"""The decode loop: condition → codes."""

import torch
from torch import Tensor

from llamagen.models.gpt import GPT
from llamagen.models.kv_cache import KVCache
from llamagen.sampling.config import SamplingConfig
from llamagen.sampling.draw import draw
from llamagen.sampling.noise import uniform


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # blocks that are compiled for training would be so anew for each position
def generate(
    gpt: GPT,
    condition: Tensor,
    config: SamplingConfig | None = None,
    *,
    caption_lengths: Tensor | None = None,
    seed: int = 0,
    indices: Tensor | None = None,
) -> Tensor:
    """Draw the codes of one picture for each condition (arXiv 2406.06525, section 2.3).

    The condition is read once (prefill), then one code a step is decoded with a key-value cache. Guidance runs both
    branches in one batch. The model is used in evaluation mode and left as it was found.

    Args:
        gpt: the model.
        condition: (B,) int64 labels, or (B, C, caption_dim) caption features padded on the left.
        config: how to draw; the model's own distribution by default.
        caption_lengths: (B,) int64, how many of the last caption positions are real; all, if not given. The
            unconditional branch uses the same padding.
        seed: seed of the run.
        indices: (B,) int64, number of each sample within the run; 0 … B − 1, if not given. Seed and number decide a
            sample's random numbers, whatever else is in the batch.

    Returns:
        (B, L) int64 codes in raster order, L = ``block_size``.

    Raises:
        ValueError: if a label is outside the model's classes, a caption length outside 1 … C, or shapes do not fit.
    """
    config = config or SamplingConfig()
    batch = len(condition)
    if indices is None:
        indices = torch.arange(batch, device=condition.device)
    _check(gpt, condition, caption_lengths, indices)
    length = gpt.config.block_size
    guided = config.guided_steps(length)
    drop_condition = torch.zeros(batch, dtype=torch.bool, device=condition.device)
    if guided:
        condition = torch.cat([condition, condition])
        drop_condition = torch.cat([drop_condition, ~drop_condition])
        caption_lengths = None if caption_lengths is None else torch.cat([caption_lengths, caption_lengths])
    cache = KVCache.allocate(gpt.config, len(condition), condition.device, _compute_dtype(gpt))
    codes = torch.empty(batch, length, dtype=torch.int64, device=condition.device)

    modes = [(module, module.training) for module in gpt.modules()]
    gpt.eval()
    try:
        logits = gpt(None, condition, caption_lengths=caption_lengths, drop_condition=drop_condition, cache=cache)
        for step in range(length):
            logits = logits[:, -1].float()
            if step < guided:
                conditional, unconditional = logits.chunk(2)
                logits = unconditional + config.guidance_scale * (conditional - unconditional)
            codes[:, step] = draw(logits, config, uniform(seed, indices, step))
            if step == length - 1:
                break
            last = codes[:, step : step + 1]
            if step + 1 < guided:
                last = torch.cat([last, last])
            elif step + 1 == guided:
                cache = cache.first_rows(batch)
                caption_lengths = None if caption_lengths is None else caption_lengths[:batch]
            logits = gpt(last, caption_lengths=caption_lengths, cache=cache)
    finally:
        for module, mode in modes:
            module.training = mode
    return codes


def _check(gpt: GPT, condition: Tensor, caption_lengths: Tensor | None, indices: Tensor) -> None:
    """Once for all codes, what the model does not check at each of them: it would have to wait for the device."""
    batch, config = len(condition), gpt.config
    if indices.shape != (batch,):
        raise ValueError(f"indices must have shape ({batch},), one for each condition, not {tuple(indices.shape)}")
    if batch and config.condition == "class" and condition.dim() == 1:
        lowest, highest = int(condition.min()), int(condition.max())
        if lowest < 0 or highest >= config.num_classes:
            raise ValueError(
                f"class {lowest if lowest < 0 else highest} was asked for, but the model knows the classes "
                f"0 to {config.num_classes - 1}"
            )
    if batch and caption_lengths is not None:
        lowest, highest = int(caption_lengths.min()), int(caption_lengths.max())
        if lowest < 1 or highest > config.condition_length:
            raise ValueError(
                f"caption_lengths holds {lowest if lowest < 1 else highest}, not 1 to {config.condition_length}"
            )


def _compute_dtype(gpt: GPT) -> torch.dtype:
    """The dtype in which the model computes its keys and values."""
    weight = gpt.output.weight
    if torch.is_autocast_enabled(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype
