"""Captions → features of a frozen T5 encoder (arXiv 1910.10683). B captions, C positions, W the encoder's width."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from llamagen.finite import check_finite
from llamagen.state_dicts import tensors_checksum
from llamagen.text.pretrained import PretrainedKind, load_pretrained, replace_surrogates, tokenize, truncate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5EncoderModel

DTYPE = Literal["bfloat16", "float32"]
T5 = PretrainedKind("T5", "T5EncoderModel", "caption encoder", "a caption encoder", "google/flan-t5-xl")
MAX_PASS_TOKENS = 8192
"""Maximum number of tokens of a forward pass, including padding. It keeps a GPU busy, and the attention scores of
FLAN-T5-XL below 1 GB."""
PROBES = (
    "",
    "A photo of 2 cats, on Dr. Smith's red sofa!",
    "  spaces \t and\nlines  ",
    "naïve façade — “quotes” … №5 ½ ﬁne ＦＵＬＬ",
    "猫が座っている。",
    "🙂 <extra_id_0> </s> {x}",
)
"""Texts whose tokens are part of the tokenizer's checksum."""


@dataclass(frozen=True)
class TextEncoderConfig:
    """Choice of the caption encoder.

    Attributes:
        name: name of a T5 on the Hugging Face Hub, or a folder, see :class:`CaptionEncoder`.
        dtype: dtype of weights and features: ``bfloat16``, or ``float32`` for GPUs older than Ampere.

    Raises:
        ValueError: for any other ``dtype``; T5 overflows in float16.
    """

    name: str = "google/flan-t5-xl"
    dtype: DTYPE = "bfloat16"

    def __post_init__(self) -> None:
        """Check the dtype."""
        _check_dtype(self.dtype)


class EncodedCaptions(NamedTuple):
    """Features of B captions.

    Attributes:
        features: (B, C, W), padded on the right with zeros.
        lengths: (B,) int64 in [1, C], number of tokens; an empty caption has one, the end token.
        truncated: (B,) bool, True for captions with more than C tokens. Their last token is still the end token.
    """

    features: Tensor
    lengths: Tensor
    truncated: Tensor


class CaptionEncoder(nn.Module):
    """The encoder of a T5 and its tokenizer, frozen: by default FLAN-T5-XL (arXiv 2210.11416), LlamaGen's choice.

    It is always in evaluation mode, has no gradients, and computes in ``dtype`` even under autocast.

    footgun: a module that owns an encoder should keep it in a tuple, ``self._encoder = (encoder,)``, and move it to
    its device itself. As a submodule its billion weights would enter state dict, optimizer and EMA, and be cast.

    float16 is rejected: T5 was trained in bfloat16, and the activations of all but the smallest models overflow in
    float16. transformers then clamps them, which keeps them finite but changes the features.

    Args:
        name: name on the Hugging Face Hub, or a folder written by ``save_pretrained``, with ``config.json``, weights
            and tokenizer. A folder, or a model in the Hub's cache, is loaded without network access.
        caption_length: number of positions C.
        dtype: dtype of weights and features; use float32 on GPUs older than Ampere.

    Raises:
        ValueError: in one line, if an argument is invalid, the extra ``text`` is not installed, or the encoder is not
            available.
    """

    def __init__(
        self, name: str | Path = "google/flan-t5-xl", caption_length: int = 120, dtype: DTYPE = "bfloat16"
    ) -> None:
        super().__init__()
        if not caption_length >= 1:
            raise ValueError(f"caption_length {caption_length} must be at least 1: the end token takes a position")
        if caption_length % 1 != 0:
            raise ValueError(f"caption_length {caption_length} must be an integer")
        _check_dtype(dtype)
        self.name = str(name)
        self.caption_length = caption_length
        self.model, self.tokenizer = load_t5(name, getattr(torch, dtype))
        self._checksums: dict[str, str] = {}
        self.requires_grad_(False).eval()

    @property
    def width(self) -> int:
        """Width W of the features."""
        return int(self.model.config.d_model)

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return cast(torch.device, self.model.shared.weight.device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and features."""
        return cast(torch.dtype, self.model.shared.weight.dtype)

    def train(self, mode: bool = True) -> "CaptionEncoder":
        """Stay in evaluation mode when a parent module switches to training."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, captions: Sequence[str], separately: bool = False) -> EncodedCaptions:
        """Encode captions independently: other captions in the list affect features only by rounding.

        Captions of similar length share a forward pass, and duplicates are encoded once, so one long list is faster
        than many short ones.

        Args:
            captions: any texts. An empty one has a single token, the end. Half a surrogate pair becomes a "?".
            separately: encode each caption in a forward pass of its own, without padding. This is slower, and its
                features are the same bits with any other captions (on one machine, with one number of threads).

        Returns:
            Features, lengths and truncation of B captions, on the encoder's device.

        Raises:
            ValueError: if ``captions`` is not a list of texts.
            FloatingPointError: if features are not finite.
        """
        texts = _texts(captions)
        rows_of = {text: row for row, text in enumerate(dict.fromkeys(texts))}  # unique texts, in their order
        row_of_caption = torch.tensor([rows_of[text] for text in texts], dtype=torch.int64, device=self.device)
        tokens = tokenize(self.tokenizer, list(rows_of))
        full_lengths = [len(each) for each in tokens]
        tokens = [truncate(each, self.caption_length) for each in tokens]
        features = torch.zeros(len(tokens), self.caption_length, self.width, dtype=self.dtype, device=self.device)
        plan = [[row] for row in range(len(tokens))] if separately else list(passes(list(map(len, tokens))))
        for rows in plan:
            encoded = self._encode([tokens[row] for row in rows])
            features[torch.tensor(rows, device=self.device), : encoded.shape[1]] = encoded
        lengths = torch.tensor(full_lengths, dtype=torch.int64, device=self.device)
        features = features if len(rows_of) == len(texts) else features[row_of_caption]
        check_finite(
            f"the features of the caption encoder {self.name} are",
            features,
            str(self.dtype).removeprefix("torch."),
            self.model,
            lambda: [self._encode([tokens[row] for row in rows]) for rows in plan],
        )
        return EncodedCaptions(
            features,
            lengths.clamp(max=self.caption_length)[row_of_caption],
            (lengths > self.caption_length)[row_of_caption],
        )

    def metadata(self) -> dict[str, str | int]:
        """Describe everything that determines the features, for a ``meta.json``. Equal checksums mean equal encoders.

        Returns:
            ``encoder`` (its name as given), ``width``, ``caption_length``, ``dtype``, and the SHA-256 of ``weights``
            and ``tokenizer``.
        """
        if not self._checksums:  # computed once: hashing gigabytes takes seconds
            # Rounded to bfloat16, so that the checksum does not depend on the dtype in which the weights were loaded.
            weights = tensors_checksum(dict(self.model.named_parameters()), torch.bfloat16)
            self._checksums = {"weights": weights, "tokenizer": self._tokenizer_checksum()}
        return {
            "encoder": self.name,
            "width": self.width,
            "caption_length": self.caption_length,
            "dtype": str(self.dtype).removeprefix("torch."),
            **self._checksums,
        }

    def _encode(self, tokens: list[list[int]]) -> Tensor:
        """Features (b, c, W) of b captions, where c is the length of the longest one; zero in the padding."""
        longest = max(map(len, tokens))
        padded = [[*each, *[self.model.config.pad_token_id] * (longest - len(each))] for each in tokens]
        is_token = torch.tensor([[place < len(each) for place in range(longest)] for each in tokens]).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            found: Tensor = self.model(torch.tensor(padded).to(self.device), attention_mask=is_token).last_hidden_state
        return found.masked_fill(~is_token.unsqueeze(2), 0)

    def _tokenizer_checksum(self) -> str:
        """SHA-256 of the vocabulary and of the tokens of :data:`PROBES`. Files of equal tokenizers may differ."""
        digest = hashlib.sha256()
        digest.update(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        digest.update(repr(tokenize(self.tokenizer, PROBES)).encode())
        return digest.hexdigest()


def passes(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Group captions of similar length into forward passes of at most ``MAX_PASS_TOKENS`` tokens, or one caption.

    Args:
        lengths: number of tokens of each caption.

    Yields:
        Indices of the captions of a pass. The longest come first, so that too little memory is an error at once.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        end = start + max(1, MAX_PASS_TOKENS // lengths[order[start]])
        yield order[start:end]
        start = end


def load_t5(name: str | Path, dtype: torch.dtype) -> "tuple[T5EncoderModel, PreTrainedTokenizerBase]":
    """Load the encoder of a T5 on the CPU, and its tokenizer.

    Args:
        name: name on the Hub, or a folder, see :class:`CaptionEncoder`.
        dtype: dtype of the weights.

    Raises:
        ValueError: in one line, if transformers is not installed, or the model is not available or not a T5.
    """
    model, tokenizer, _ = load_pretrained(name, T5, dtype, _check_tokenizer)
    return model, tokenizer


def _check_tokenizer(config: Any, tokenizer: "PreTrainedTokenizerBase", *_: Any) -> None:
    """Check that captions end with T5's end token, and that the model has an embedding for each token."""
    if tokenizer("")["input_ids"] != [config.eos_token_id]:
        raise ValueError(f"its tokenizer does not end captions with token {config.eos_token_id}")
    if (last := max(tokenizer.get_vocab().values())) >= config.vocab_size:
        raise ValueError(f"its tokenizer has a token {last}, its model only {config.vocab_size} tokens")


def _check_dtype(dtype: str) -> None:
    if dtype not in get_args(DTYPE):
        hint = "; T5 overflows in float16" if "16" in str(dtype) else ""
        raise ValueError(f"dtype {dtype!r} of a caption encoder must be one of {', '.join(get_args(DTYPE))}{hint}")


def _texts(captions: Sequence[str]) -> list[str]:
    """Check captions, and convert them to texts that the tokenizer can read."""
    if isinstance(captions, str):
        raise ValueError(f"captions must be a list of texts, not the text {captions[:40]!r}")
    for place, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(f"caption {place} must be a text, not {caption!r:.40}")
    return [replace_surrogates(caption) for caption in captions]
