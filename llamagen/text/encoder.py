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
from llamagen.text.pretrained import PretrainedKind, cut, load_pretrained, readable, tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, T5EncoderModel

DTYPE = Literal["bfloat16", "float32"]
T5 = PretrainedKind("T5", "T5EncoderModel", "caption encoder", "a caption encoder", "google/flan-t5-xl")
TOKENS_IN_PASS = 8192
"""Padding included; keeps a GPU busy, and the attention of FLAN-T5-XL below 1 GB."""
PROBES = (
    "",
    "A photo of 2 cats, on Dr. Smith's red sofa!",
    "  spaces \t and\nlines  ",
    "naïve façade — “quotes” … №5 ½ ﬁne ＦＵＬＬ",
    "猫が座っている。",
    "🙂 <extra_id_0> </s> {x}",
)
"""What is tokenized for the tokenizer's checksum."""


@dataclass(frozen=True)
class TextEncoderConfig:
    """Which encoder reads captions.

    Attributes:
        name: of a T5 on the Hugging Face Hub, or a folder, see :class:`CaptionEncoder`.
        dtype: of its weights and features: ``bfloat16``, or ``float32`` for GPUs older than Ampere.
    """

    name: str = "google/flan-t5-xl"
    dtype: DTYPE = "bfloat16"


class EncodedCaptions(NamedTuple):
    """What becomes of B captions.

    Attributes:
        features: (B, C, W), padded on the right with zeros.
        lengths: (B,) int64 in [1, C], the number of tokens; an empty caption has the one that ends every caption.
        truncated: (B,) bool, True where a caption has more tokens than C. Its last position is the end all the same.
    """

    features: Tensor
    lengths: Tensor
    truncated: Tensor


class CaptionEncoder(nn.Module):
    """The encoder of a T5 and its tokenizer, frozen: by default FLAN-T5-XL (arXiv 2210.11416), LlamaGen's choice.

    It is a fixed function: always in evaluation mode, without gradients, and as precise as ``dtype`` says, whatever
    autocast is on. An owner that is a module keeps it in a tuple, ``self._encoder = (encoder,)``: then its billion of
    weights is in no state dict, optimizer or average, and nobody casts it; the owner moves it to its device.

    float16 is refused: T5 was trained in bfloat16, and activations of all but the smallest models leave float16's
    range. What transformers does about it (it cuts them off) keeps them finite, but they are others.

    Args:
        name: name on the Hugging Face Hub, or a folder with ``config.json``, weights and the tokenizer, as
            ``save_pretrained`` writes it. Nothing of a folder is looked for in a network.
        caption_length: number of positions C.
        dtype: of weights and features; float32 on GPUs older than Ampere.

    Raises:
        ValueError: in one line, if an argument is wrong, the extra ``text`` is missing, or the encoder cannot be had.
    """

    def __init__(
        self, name: str | Path = "google/flan-t5-xl", caption_length: int = 120, dtype: DTYPE = "bfloat16"
    ) -> None:
        super().__init__()
        if not caption_length >= 1:
            raise ValueError(f"caption_length {caption_length} must be at least 1: a caption's end takes a position")
        if caption_length % 1 != 0:
            raise ValueError(f"caption_length {caption_length} must be a whole number")
        if dtype not in get_args(DTYPE):
            hint = "; T5's activations leave the range of float16" if "16" in str(dtype) else ""
            raise ValueError(f"dtype {dtype!r} of a caption encoder must be one of {', '.join(get_args(DTYPE))}{hint}")
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
        """Where the weights are."""
        return cast(torch.device, self.model.shared.weight.device)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and features."""
        return cast(torch.dtype, self.model.shared.weight.dtype)

    def train(self, mode: bool = True) -> "CaptionEncoder":
        """Stay in evaluation mode, whatever a parent does."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, captions: Sequence[str]) -> EncodedCaptions:
        """Encode captions, each for itself: what else is in the list changes the features by rounding at most.

        Captions of about the same length go through the encoder together, as many as fit into a number of tokens, and
        equal ones once, so a long list is faster than many short ones.

        Args:
            captions: any texts; an empty one has a single token, the end. Half a surrogate pair counts as a "?".

        Returns:
            All on the encoder's device.

        Raises:
            ValueError: if they are no texts.
            FloatingPointError: if features are not finite.
        """
        texts = _texts(captions)
        index = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        places = torch.tensor([index[text] for text in texts], dtype=torch.int64, device=self.device)
        tokens = tokenized(self.tokenizer, list(index))
        whole = [len(each) for each in tokens]
        tokens = [cut(each, self.caption_length) for each in tokens]
        features = torch.zeros(len(tokens), self.caption_length, self.width, dtype=self.dtype, device=self.device)
        for rows in passes([len(each) for each in tokens]):
            encoded = self._encode([tokens[row] for row in rows])
            features[torch.tensor(rows, device=self.device), : encoded.shape[1]] = encoded
        lengths = torch.tensor(whole, dtype=torch.int64, device=self.device)
        features = features if len(index) == len(texts) else features[places]
        check_finite(
            f"the features of the caption encoder {self.name} are",
            features,
            str(self.dtype).removeprefix("torch."),
            self.model,
            lambda: [self._encode([tokens[row] for row in rows]) for rows in passes(list(map(len, tokens)))],
        )
        return EncodedCaptions(
            features,
            lengths.clamp(max=self.caption_length)[places],
            (lengths > self.caption_length)[places],
        )

    def facts(self) -> dict[str, str | int]:
        """What features depend on, for a ``meta.json``; the checksums tell whether others are of the same encoder.

        Returns:
            ``encoder`` (as it was named), ``width``, ``caption_length``, ``dtype``, and the SHA-256 of ``weights`` and
            ``tokenizer``.
        """
        if not self._checksums:  # over gigabytes, which never change
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
        """(b, c, W), c the length of the longest, zero where there is no token."""
        longest = max(map(len, tokens))
        padded = [[*each, *[self.model.config.pad_token_id] * (longest - len(each))] for each in tokens]
        is_token = torch.tensor([[place < len(each) for place in range(longest)] for each in tokens]).to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            found: Tensor = self.model(torch.tensor(padded).to(self.device), attention_mask=is_token).last_hidden_state
        return found.masked_fill(~is_token.unsqueeze(2), 0)

    def _tokenizer_checksum(self) -> str:
        """Over its vocabulary and what it makes of some texts: not over its files, which differ by version."""
        digest = hashlib.sha256()
        digest.update(repr(sorted(self.tokenizer.get_vocab().items())).encode())
        digest.update(repr(tokenized(self.tokenizer, PROBES)).encode())
        return digest.hexdigest()


def passes(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Share captions out over passes of about equal lengths and at most ``TOKENS_IN_PASS`` tokens, or one caption.

    Args:
        lengths: the number of tokens of each caption.

    Yields:
        Numbers of captions, the longest first, so that memory runs out at the start or not at all.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    start = 0
    while start < len(order):
        end = start + max(1, TOKENS_IN_PASS // lengths[order[start]])
        yield order[start:end]
        start = end


def load_t5(name: str | Path, dtype: torch.dtype) -> "tuple[T5EncoderModel, PreTrainedTokenizerBase]":
    """The encoder of a T5 on the CPU, and its tokenizer.

    Args:
        name: a name on the Hub or a folder, see :class:`CaptionEncoder`.
        dtype: of the weights.

    Raises:
        ValueError: in one line, if transformers is not installed, or they cannot be had or are something else.
    """
    model, tokenizer, _ = load_pretrained(name, T5, dtype, _check_tokenizer)
    return model, tokenizer


def _check_tokenizer(config: Any, tokenizer: "PreTrainedTokenizerBase", *_: Any) -> None:
    """See that a tokenizer ends captions as T5 knows it, and knows no token that the model does not."""
    if tokenizer("")["input_ids"] != [config.eos_token_id]:
        raise ValueError(f"its tokenizer does not end captions with token {config.eos_token_id}")
    if (last := max(tokenizer.get_vocab().values())) >= config.vocab_size:
        raise ValueError(f"its tokenizer has a token {last}, its model only {config.vocab_size} tokens")


def _texts(captions: Sequence[str]) -> list[str]:
    """Captions that a tokenizer can read."""
    if isinstance(captions, str):
        raise ValueError(f"captions must be a list of texts, not the text {captions[:40]!r}")
    for place, caption in enumerate(captions):
        if not isinstance(caption, str):
            raise ValueError(f"caption {place} must be a text, not {caption!r:.40}")
    return [readable(caption) for caption in captions]
