"""CLIP (arXiv 2103.00020): how well images fit their prompts. B images of S × S pixels, W features."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.multimodal.clip_score import CLIPScore

from llamagen.finite import check_finite
from llamagen.metrics import extract
from llamagen.metrics.features import without_tf32
from llamagen.text.pretrained import PretrainedKind, load_pretrained, replace_surrogates, tokenize, truncate

if TYPE_CHECKING:
    from transformers import CLIPModel, PreTrainedTokenizerBase

DEFAULT = "openai/clip-vit-large-patch14"
CLIP = PretrainedKind("CLIP", "CLIPModel", "CLIP", "the CLIP score", DEFAULT)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the images that CLIP was trained with, in [0, 1]; what a checkpoint says of itself comes first."""
OLD_END = 2
"""What old configurations, OpenAI's own among them, falsely give as the token that ends a text. transformers then takes
the largest token of a text for its end."""


@dataclass(frozen=True)
class Preparation:
    """What is done to an image before a CLIP sees it, as its checkpoint says.

    It is done with Pillow, as in CLIP's publication. transformers does it with torchvision where that is installed, and
    else with Pillow, so that numbers would depend on it.

    Attributes:
        side: pixels to which the shorter side is resized.
        crop: side S of the square that is cut out of the middle.
        resample: Pillow's number of the filter; 3 is bicubic.
        mean: of each channel, of values in [0, 1].
        std: likewise.
    """

    side: int
    crop: int
    resample: int = 3
    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD

    def __call__(self, pixels: np.ndarray) -> Tensor:
        """(H, W, 3) uint8 → (3, S, S) uint8."""
        height, width = pixels.shape[:2]
        short = min(height, width)
        size = (self.side * width // short, self.side * height // short)
        image = Image.fromarray(pixels).resize(size, Image.Resampling(self.resample))
        left, top = (size[0] - self.crop) // 2, (size[1] - self.crop) // 2
        square = image.crop((left, top, left + self.crop, top + self.crop))
        return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous()


class Clip(nn.Module):
    """A CLIP of transformers, frozen, in float32. As an extractor of :func:`llamagen.metrics.extract` it gives features
    of prepared images.

    Args:
        name: name on the Hugging Face Hub, or a folder with ``config.json``, weights, ``preprocessor_config.json`` and
            the tokenizer, as ``save_pretrained`` writes it. Nothing of a folder is looked for in a network.

    Attributes:
        name: what it is called in the names of metrics: the last part of its name or path.
        source: the name as it was given.
        preparation: of images.
        length: most tokens of a prompt, begin and end included; 77 of the published ones.

    Raises:
        ValueError: in one line, if the extra ``text`` is missing, or the CLIP cannot be had or is something else.
    """

    def __init__(self, name: str | Path = DEFAULT) -> None:
        super().__init__()
        self.source = str(name)
        self.model, self.tokenizer, self.preparation = load_clip(name)
        self.name = short_name(name)
        self.length = int(self.model.config.text_config.max_position_embeddings)
        self._encoded: dict[str, tuple[Tensor, bool]] = {}
        self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return cast(torch.device, self.model.logit_scale.device)

    def train(self, mode: bool = True) -> "Clip":
        """Stay in evaluation mode, whatever a parent does."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, W) of prepared images (B, 3, S, S), float32 in 0 … 255."""
        mean, std = (
            torch.tensor(values, device=images.device).view(3, 1, 1)
            for values in (self.preparation.mean, self.preparation.std)
        )
        return cast(Tensor, self.model.get_image_features((images / 255 - mean) / std).pooler_output)

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Features (B, W) of prompts, each of which goes through the model once, however often it is asked for.

        One that has too many tokens is cut and keeps the token that ends it, whose features are those of the text.
        torchmetrics cuts the end off, too, and so compares images with some word, or with the beginning of any text.
        Half a surrogate pair counts as a "?".

        Raises:
            ValueError: if it is given one text instead of a list.
        """
        if isinstance(prompts, str):  # whose letters would be prompts
            raise ValueError(f"prompts must be a list of texts, not the text {prompts[:40]!r}")
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        if new:
            whole = tokenize(self.tokenizer, [replace_surrogates(prompt) for prompt in new])
            tokens = [truncate(each, self.length) for each in whole]
            longest = max(map(len, tokens))
            # More ends after the end: no token sees what comes after it, and the first end is the one that counts.
            ids = torch.tensor([[*each, *[each[-1]] * (longest - len(each))] for each in tokens], device=self.device)
            with torch.autocast(self.device.type, enabled=False), without_tf32():
                features = self.model.get_text_features(ids, ids.new_ones(ids.shape)).pooler_output
            check_finite(
                f"the text features of {self.name} are",
                features,
                "float32",
                self.model,
                lambda: self.model.get_text_features(ids, ids.new_ones(ids.shape)),
            )
            for prompt, row, uncut in zip(new, features.cpu(), whole, strict=True):
                self._encoded[prompt] = row, len(uncut) > self.length
        return torch.stack([self._encoded[prompt][0] for prompt in prompts]).to(self.device)

    def was_cut(self, prompt: str) -> bool:
        """Whether a prompt that was encoded has more tokens than the model reads."""
        return self._encoded[prompt][1]


class ImageScores(CLIPScore):
    """torchmetrics' CLIP score with that of each image: 100 · max(cos, 0) of its features and its prompt's.

    torchmetrics takes the maximum of the mean; here it is taken of each image, as in the score's publication (arXiv
    2104.08718, whose factor is 2.5 and not 100). The two differ only where a cosine is below zero. Sums are in float64.

    Args:
        clip: gives features.
        **kwargs: of any ``torchmetrics.Metric``.
    """

    of_each: list[Tensor] | Tensor

    def __init__(self, clip: Clip, **kwargs: Any) -> None:
        super().__init__(lambda: (clip, clip.tokenizer), **kwargs)
        self.add_state("score", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("of_each", [], dist_reduce_fx="cat")

    def update(self, source: Tensor, target: list[str]) -> None:  # type: ignore[override]
        """Take images into account.

        Args:
            source: (B, 3, S, S) uint8, prepared images on the device of the model.
            target: their prompts.
        """
        assert len(source) == len(target)
        clip = cast(Clip, self.model)
        images, prompts = extract(clip, source).pool, clip.encode(target)
        scores = 100 * F.cosine_similarity(images.double(), prompts.double()).clamp(min=0)
        self.score += scores.sum()
        self.n_samples += len(scores)
        cast(list[Tensor], self.of_each).append(scores)

    def each(self) -> np.ndarray:
        """Scores of the images in the order in which they came, (N,) float64."""
        parts = self.of_each if isinstance(self.of_each, list) else [self.of_each]
        return np.concatenate([part.cpu().numpy() for part in parts])


def short_name(name: str | Path) -> str:
    """What a CLIP is called in the names of metrics; of a folder in the Hub's cache what it is called on the Hub."""
    path = Path(name).expanduser()
    path = path.resolve() if path.is_dir() else path
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.split("--")[-1]
    return "_".join(path.name.split())


def load_clip(name: str | Path) -> "tuple[CLIPModel, PreTrainedTokenizerBase, Preparation]":
    """A CLIP on the CPU, its tokenizer, and what it wants to be done to images.

    Args:
        name: a name on the Hub or a folder, see :class:`Clip`.

    Raises:
        ValueError: in one line, if transformers is not installed, or they cannot be had or are something else.
    """
    return load_pretrained(name, CLIP, torch.float32, _check)


def _check(config: Any, tokenizer: "PreTrainedTokenizerBase", source: str, local: bool) -> Preparation:
    from transformers import ImageProcessingMixin

    said, _ = ImageProcessingMixin.get_image_processor_dict(source, local_files_only=local)
    preparation = _preparation(said, config.vision_config.image_size)
    _check_tokenizer(tokenizer, config.text_config)
    return preparation


def _preparation(said: dict[str, Any], image_size: int) -> Preparation:
    """Of what ``preprocessor_config.json`` says; what it leaves out is as CLIP's publication has it."""
    side, crop = _side(said.get("size", image_size)), _side(said.get("crop_size", image_size))
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    if not all(said.get(step, True) for step in steps) or crop != image_size or side is None or side < crop:
        raise ValueError(
            f"its preprocessor_config.json does not resize the shorter side and cut out {image_size} × {image_size} "
            "pixels"
        )
    mean, std = (tuple(map(float, said.get(key, values))) for key, values in (("image_mean", MEAN), ("image_std", STD)))
    return Preparation(side, crop, int(said.get("resample", 3)), mean, std)


def _side(size: Any) -> int | None:
    """Of a size that is one number, in any of the forms that transformers has had for it."""
    if isinstance(size, dict):
        sides = {value for key, value in size.items() if key in ("shortest_edge", "height", "width") and value}
        size = sides.pop() if len(sides) == 1 else None
    return size if isinstance(size, int) and size > 0 else None


def _check_tokenizer(tokenizer: "PreTrainedTokenizerBase", config: Any) -> None:
    """See that a tokenizer ends texts as the model knows it, and knows no token that the model does not."""
    tokens, last = tokenizer("")["input_ids"], max(tokenizer.get_vocab().values())
    end = last if config.eos_token_id == OLD_END else config.eos_token_id
    if not tokens or tokens[-1] != end or tokens.count(end) != 1:
        raise ValueError(f"its tokenizer does not end texts with token {end}")
    if last >= config.vocab_size:
        raise ValueError(f"its tokenizer has a token {last}, its model only {config.vocab_size} tokens")
