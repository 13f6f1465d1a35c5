"""Sample images of a model, in a grid, for its card."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from llamagen.grids import captioned_grid
from llamagen.pretrained.model import ClassOrPrompt, LlamaGen

COLUMNS = 4
"""Maximum number of images in a row."""


@dataclass(frozen=True)
class Samples:
    """Sample images.

    Attributes:
        grid: the images with their conditions.
        conditions: classes or prompts, as given to :meth:`~llamagen.pretrained.model.LlamaGen.generate`.
        images_per_prompt: images of each.
    """

    grid: Image.Image
    conditions: tuple[ClassOrPrompt, ...]
    images_per_prompt: int


def sample_images(
    model: LlamaGen, count: int, conditions: Sequence[ClassOrPrompt], prompts: Sequence[str]
) -> Samples | None:
    """Generate images with seed 0 and the model's own settings.

    Args:
        model: the model; a tokenizer alone generates none.
        count: number of images N; 0 for none. If there are more ``conditions``, one image of each.
        conditions: classes or prompts. By default classes spread over all classes, or ``prompts``.
        prompts: prompts for a text model that was given no conditions.

    Returns:
        The images; None if there are none.
    """
    if model.gpt is None or not count:
        return None
    chosen: tuple[ClassOrPrompt, ...] = tuple(conditions)
    if not chosen and model.class_names is not None:
        classes = len(model.class_names)
        chosen = tuple(number * classes // min(count, classes) for number in range(min(count, classes)))
    chosen = chosen or tuple(prompts[:count])
    if not chosen:
        return None
    each = max(1, count // len(chosen))
    images = [np.asarray(image) for image in model.generate(chosen, images_per_prompt=each, seed=0)]
    captions = [_caption(model, condition) for condition in chosen] * each
    columns = min(COLUMNS, len(chosen))
    starts = range(0, len(images), columns)
    grid = captioned_grid(
        [images[start : start + columns] for start in starts], [captions[start : start + columns] for start in starts]
    )
    return Samples(grid, chosen, each)


def _caption(model: LlamaGen, condition: ClassOrPrompt) -> str:
    if model.class_names is None:
        return str(condition)
    number = model.class_names.find(condition)
    name = model.class_names[number]
    return name if name == str(number) else f"{number}: {name}"
