"""CLIP (arXiv 2103.00020) and its score. B images of S × S pixels, W features."""

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
"""Statistics of CLIP's training images, in [0, 1]; used if a checkpoint does not give its own."""
OLD_END = 2
"""Wrong end-of-text token in old configurations, including OpenAI's own. With it, transformers takes the largest token
of a text as the end-of-text token."""


@dataclass(frozen=True)
class Preparation:
    """Preprocessing of a CLIP's images, according to its checkpoint.

    It uses Pillow, as CLIP's publication does. transformers uses torchvision if that is installed, so its scores depend
    on the installation.

    Attributes:
        side: length in pixels to which the shorter side is resized.
        crop: side S of the centre crop.
        resample: Pillow's number of the filter; 3 is bicubic.
        mean: mean of each channel, for values in [0, 1].
        std: standard deviation of each channel, for values in [0, 1].
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
    """A frozen CLIP in float32, loaded by transformers. An extractor for :func:`llamagen.metrics.extract`.

    Args:
        name: name on the Hugging Face Hub, or a folder with ``config.json``, weights, ``preprocessor_config.json`` and
            the tokenizer, as ``save_pretrained`` writes it. A folder never needs network access.

    Attributes:
        name: name in result names: the last part of the Hub's name or of the path.
        source: the name as given.
        preparation: preprocessing of images.
        length: maximum number of tokens of a prompt including begin and end; 77 for published models.

    Raises:
        ValueError: in one line, if the extra ``text`` is missing, or the CLIP is not available or not a CLIP.
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
        """Device of the weights."""
        return cast(torch.device, self.model.logit_scale.device)

    def train(self, mode: bool = True) -> "Clip":
        """Stay in evaluation mode, even if a parent is set to training."""
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
        """Features (B, W) of prompts. They are cached, so each prompt is encoded once.

        footgun: CLIP's text features are those of the end token, so truncation must keep it. torchmetrics cuts it off,
        and compares images with the features of another token. Lone surrogates are encoded as "?".

        Raises:
            ValueError: if ``prompts`` is one text instead of a list.
        """
        if isinstance(prompts, str):  # each of its letters would count as a prompt
            raise ValueError(f"prompts must be a list of texts, not the text {prompts[:40]!r}")
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._encoded]
        if new:
            whole = tokenize(self.tokenizer, [replace_surrogates(prompt) for prompt in new])
            tokens = [truncate(each, self.length) for each in whole]
            longest = max(map(len, tokens))
            # Pad with end tokens: attention is causal, and CLIP uses the first end token.
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
    """torchmetrics' CLIP score, with the score of each image: 100 · max(cos(image features, prompt features), 0).

    The maximum is taken for each image, as in the score's publication (arXiv 2104.08718, with a factor of 2.5 instead
    of 100). torchmetrics clamps the mean instead, which differs only if a cosine is negative. Sums are in float64.

    Args:
        clip: extractor of image and prompt features.
        **kwargs: options of ``torchmetrics.Metric``.
    """

    image_scores: list[Tensor] | Tensor

    def __init__(self, clip: Clip, **kwargs: Any) -> None:
        super().__init__(lambda: (clip, clip.tokenizer), **kwargs)
        self.add_state("score", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("image_scores", [], dist_reduce_fx="cat")

    def update(self, source: Tensor, target: list[str]) -> None:  # type: ignore[override]
        """Add images.

        Args:
            source: (B, 3, S, S) uint8, prepared images on the model's device.
            target: B prompts.
        """
        assert len(source) == len(target)
        clip = cast(Clip, self.model)
        images, prompts = extract(clip, source).pool, clip.encode(target)
        scores = 100 * F.cosine_similarity(images.double(), prompts.double()).clamp(min=0)
        self.score += scores.sum()
        self.n_samples += len(scores)
        cast(list[Tensor], self.image_scores).append(scores)

    def scores(self) -> np.ndarray:
        """Scores of the images in the order of the updates, (N,) float64."""
        parts = self.image_scores if isinstance(self.image_scores, list) else [self.image_scores]
        return np.concatenate([part.cpu().numpy() for part in parts])


def short_name(name: str | Path) -> str:
    """Name of a CLIP in result names. For a folder in the Hub's cache it is the name on the Hub."""
    path = Path(name).expanduser()
    path = path.resolve() if path.is_dir() else path
    if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
        return path.parent.parent.name.split("--")[-1]
    return "_".join(path.name.split())


def load_clip(name: str | Path) -> "tuple[CLIPModel, PreTrainedTokenizerBase, Preparation]":
    """Load a CLIP on the CPU, its tokenizer and its preprocessing.

    Args:
        name: a name on the Hub or a folder, see :class:`Clip`.

    Raises:
        ValueError: in one line, if transformers is not installed, or the CLIP is not available or not a CLIP.
    """
    return load_pretrained(name, CLIP, torch.float32, _check)


def _check(config: Any, tokenizer: "PreTrainedTokenizerBase", source: str, local: bool) -> Preparation:
    from transformers import ImageProcessingMixin

    settings, _ = ImageProcessingMixin.get_image_processor_dict(source, local_files_only=local)
    preparation = _preparation(settings, config.vision_config.image_size)
    _check_tokenizer(tokenizer, config.text_config)
    return preparation


def _preparation(settings: dict[str, Any], image_size: int) -> Preparation:
    """Preprocessing according to ``preprocessor_config.json``; defaults are those of CLIP's publication."""
    side, crop = _side(settings.get("size", image_size)), _side(settings.get("crop_size", image_size))
    steps = ("do_resize", "do_center_crop", "do_rescale", "do_normalize")
    if not all(settings.get(step, True) for step in steps) or crop != image_size or side is None or side < crop:
        raise ValueError(
            f"its preprocessor_config.json does not resize the shorter side and cut out {image_size} × {image_size} "
            "pixels"
        )
    defaults = (("image_mean", MEAN), ("image_std", STD))
    mean, std = (tuple(map(float, settings.get(key, values))) for key, values in defaults)
    return Preparation(side, crop, int(settings.get("resample", 3)), mean, std)


def _side(size: Any) -> int | None:
    """The side of a square size, in any of the forms that transformers has used."""
    if isinstance(size, dict):
        sides = {value for key, value in size.items() if key in ("shortest_edge", "height", "width") and value}
        size = sides.pop() if len(sides) == 1 else None
    return size if isinstance(size, int) and size > 0 else None


def _check_tokenizer(tokenizer: "PreTrainedTokenizerBase", config: Any) -> None:
    """Check that the tokenizer ends texts with the model's end token and has no token that the model lacks."""
    tokens, last = tokenizer("")["input_ids"], max(tokenizer.get_vocab().values())
    end = last if config.eos_token_id == OLD_END else config.eos_token_id
    if not tokens or tokens[-1] != end or tokens.count(end) != 1:
        raise ValueError(f"its tokenizer does not end texts with token {end}")
    if last >= config.vocab_size:
        raise ValueError(f"its tokenizer has a token {last}, its model only {config.vocab_size} tokens")
