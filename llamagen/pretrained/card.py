"""The model card of an exported model: its ``README.md``, with a header that the hub understands.

It states what is recorded, and leaves out what is not.
"""

import json
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from llamagen.class_names import ClassNames
from llamagen.models.vqgan import VQGANConfig
from llamagen.pretrained.model import LlamaGen
from llamagen.pretrained.run_facts import Metric, RunFacts
from llamagen.pretrained.sample_images import Samples
from llamagen.sampling import SamplingConfig

PAPER = "https://arxiv.org/abs/2406.06525"
LIBRARY = "llamagen-lightning"
MAX_LISTED_CLASSES = 20
CITATION = """```bibtex
@article{sun2024autoregressive,
  title   = {Autoregressive Model Beats Diffusion: Llama for Scalable Image Generation},
  author  = {Sun, Peize and Jiang, Yi and Chen, Shoufa and Zhang, Shilong and Peng, Bingyue and Luo, Ping and
             Yuan, Zehuan},
  journal = {arXiv preprint arXiv:2406.06525},
  year    = {2024}
}
```"""


@dataclass(frozen=True)
class Card:
    """Content of a model card.

    Attributes:
        model: the exported model.
        address: how to load it: its repository or folder.
        facts: what the run recorded.
        license: licence of the weights as the hub names it; None if not stated.
        base: repository of the published weights that it is, or was initialised from; None for neither.
        is_published: whether it holds the published weights of ``base`` themselves.
        samples: sample images, which are stored in ``samples_file``; None for none.
        samples_file: name of the file of the samples.
        reconstructions_file: name of the file with reconstructions; None if there is none.
        names_classes: whether the names of the classes are known.
        text_encoder: name of the text encoder; None if unknown, or for other models.
    """

    model: LlamaGen
    address: str
    facts: RunFacts
    license: str | None = None
    base: str | None = None
    is_published: bool = False
    samples: Samples | None = None
    samples_file: str = "samples.png"
    reconstructions_file: str | None = None
    names_classes: bool = False
    text_encoder: str | None = None

    def markdown(self) -> str:
        """The text of the ``README.md``."""
        parts = [
            self._header(),
            f"# {_escaped(self.model.name)}",
            self._description(),
            self._images(),
            self._usage(),
            f"## Model\n\n{_table(('', ''), self._architecture().items())}",
            self._training(),
            self._measured(),
            self._classes(),
            self._licence(),
            f"## Citation\n\nThe method is that of the LlamaGen paper:\n\n{CITATION}",
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _header(self) -> str:
        gpt = self.model.gpt
        tags = ["llamagen", "image-tokenizer", "vqgan"]
        header: dict[str, Any] = {"library_name": LIBRARY}
        if gpt is not None:
            is_text = gpt.config.condition == "text"
            header["pipeline_tag"] = "text-to-image" if is_text else "unconditional-image-generation"
            kind = "text-to-image" if is_text else "class-conditional"
            tags = ["llamagen", "image-generation", "autoregressive", kind, "vqgan"]
        header["tags"] = tags
        if self.license is not None:
            header = {"license": self.license} | header
        if self.base is not None:
            header["base_model"] = self.base
        return f"---\n{yaml.safe_dump(header, sort_keys=False, allow_unicode=True)}---"

    def _description(self) -> str:
        model, codes = self.model, self.model.tokenizer.config
        if model.gpt is None:
            text = (
                f"An image tokenizer of [LlamaGen]({PAPER}): it encodes each {codes.downsampling} × "
                f"{codes.downsampling} pixels of an image as one of {codes.codebook_size:,} codes, and decodes codes "
                "to images."
            )
        else:
            is_text = model.condition == "text"
            what = "from prompts" if is_text else f"of {model.gpt.config.num_classes:,} classes"
            text = (
                f"A [LlamaGen]({PAPER}): an autoregressive model that generates images of {model.resolution} × "
                f"{model.resolution} pixels {what} as sequences of codes, with the image tokenizer of these codes."
            )
        if self.is_published:
            text += f" These are the published weights of [{self.base}](https://huggingface.co/{self.base})."
        return f"{text} Exported with {LIBRARY}."

    def _images(self) -> str:
        parts = []
        if (samples := self.samples) is not None:
            arguments = f"{list(samples.conditions)!r}, images_per_prompt={samples.images_per_prompt}, seed=0"
            parts.append(
                f"![Samples]({self.samples_file})\n\nNot selected: the images of `model.generate({arguments})`, in "
                f"rows, with {_sampling(self.model.sampling)}."
            )
        if self.reconstructions_file is not None:
            parts.append(
                f"![Reconstructions]({self.reconstructions_file})\n\nImages above their reconstructions, recorded "
                "while training."
            )
        return "\n\n".join(parts)

    def _usage(self) -> str:
        names = self.model.class_names
        if self.model.gpt is None:
            call = 'codes = model.encode("image.png")\nimages = model.decode(codes)'
        elif names is not None:
            call = f"images = model.generate({_first_classes(names)!r}, seed=0)"
        else:
            prompt = self.samples.conditions[0] if self.samples is not None else "a photo of a dog"
            call = f"images = model.generate([{prompt!r}], seed=0)"
        python = f'from llamagen import LlamaGen\n\n{_load_line(self.address)}\n{call}\nimages[0].save("out.png")'
        return f"## Use\n\n```python\n{python}\n```\n\n```bash\n{_page_line(self.address)}\n```"

    def _architecture(self) -> dict[str, str]:
        rows: dict[str, Any] = {}
        if (gpt := self.model.gpt) is not None:
            config = gpt.config
            rows |= {
                "Parameters": f"{_count(gpt):,}",
                "Layers, heads, width": f"{config.n_layer}, {config.n_head}, {config.dim}",
                "Codes of an image": f"{config.grid_size} × {config.grid_size} of {config.vocab_size:,}",
                "Resolution": f"{self.model.resolution} px",
            }
            if config.condition == "text":
                rows["Tokens of a prompt"] = f"at most {config.caption_length}, of width {config.caption_dim}"
                rows["Text encoder"] = self.text_encoder and f"`{self.text_encoder}`"
            rows["Default sampling"] = _sampling(self.model.sampling)
            rows["Default precision"] = self.model.dtype
        rows["Tokenizer"] = _tokenizer(self.model.tokenizer.config, _count(self.model.tokenizer))
        return {name: value for name, value in rows.items() if value}

    def _training(self) -> str:
        rows = self.facts.training
        return f"## Training\n\n{_table(('', ''), rows.items())}" if rows else ""

    def _measured(self) -> str:
        facts, parts = self.facts, []
        if facts.evaluation is not None:
            values = [(f"`{name}`", f"{value:.4g}") for name, value in facts.evaluation.metrics.items()]
            parts.append(_table(("Evaluation of these weights", ""), values))
            parts.append("\n".join(f"- {name}: {_escaped(value)}" for name, value in facts.evaluation.facts.items()))
        if facts.metrics:
            parts.append(_table(("While training", "value", "after batches"), map(_row, facts.metrics)))
        if facts.best:
            parts.append(_table(("Lowest FID of the run", "value", "after batches"), map(_row, facts.best)))
        return "\n\n".join(["## Measured", *parts]) if parts else ""

    def _classes(self) -> str:
        names = self.model.class_names
        if names is None or not self.names_classes or names.names == tuple(map(str, range(len(names)))):
            return ""
        listed = "\n".join(f"- {number}: {_escaped(name)}" for number, name in enumerate(names.names))
        if len(names) > MAX_LISTED_CLASSES:
            listed = f"<details><summary>{len(names):,} classes</summary>\n\n{listed}\n\n</details>"
        return f"## Classes\n\n{listed}"

    def _licence(self) -> str:
        lines = []
        if self.license is not None:
            lines.append(f"The weights have the licence `{self.license}`.")
        if self.base is not None:
            verb = "are" if self.is_published else "started from"
            lines.append(
                f"They {verb} weights of [{self.base}](https://huggingface.co/{self.base}), whose licence and terms of "
                "use apply."
                if lines
                else f"The weights {verb} those of [{self.base}](https://huggingface.co/{self.base}), whose licence "
                "and terms of use apply."
            )
        return f"## Licence\n\n{' '.join(lines)}" if lines else ""


def with_address(text: str, old: str, new: str) -> str:
    """The text of a card whose model is loaded from another address."""
    for line in (_load_line, _page_line):
        text = text.replace(line(old), line(new))
    return text


def _load_line(address: str) -> str:
    return f"model = LlamaGen.from_pretrained({json.dumps(address, ensure_ascii=False)})"


def _page_line(address: str) -> str:
    return f"python -m serving.page {shlex.quote(address)}"


def _first_classes(names: ClassNames) -> list[Any]:
    """The first classes, by name if the name is a word that finds the class."""
    chosen: list[Any] = []
    for number in range(min(2, len(names))):
        try:
            is_name = names.find(names[number]) == number and not names[number].isdecimal()
        except ValueError:  # the name of two classes
            is_name = False
        chosen.append(names[number] if is_name else number)
    return chosen


def _tokenizer(config: VQGANConfig, count: int) -> str:
    quantizer = "" if config.quantizer is None else f", quantizer `{config.quantizer['class_path']}`"
    return (
        f"VQGAN of {count:,} parameters, {config.downsampling} × downsampling, {config.codebook_size:,} codes of width "
        f"{config.codebook_dim}{quantizer}"
    )


def _sampling(config: SamplingConfig) -> str:
    """Settings that differ from the defaults of the class, and guidance, always."""
    default = SamplingConfig().image_settings()
    settings = {
        name: value
        for name, value in config.image_settings().items()
        if value != default[name] or name == "guidance_scale"
    }
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _row(metric: Metric) -> tuple[str, str, str]:
    return f"`{metric.name}`", f"{metric.value:.4g}", f"{metric.batch:,}"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]] | Mapping[str, str]) -> str:
    """A Markdown table."""
    cells = [head, ("---",) * len(head), *(tuple(_escaped(cell) for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _escaped(text: str) -> str:
    """Text in one line, without a meaning for tables and HTML."""
    line = " ".join(str(text).split())
    return line.replace("|", "\\|").replace("<", "&lt;")
