"""Share a model: write a folder that ``LlamaGen.from_pretrained`` loads, or upload it to the hub.

The folder holds ``model.safetensors`` (not for a tokenizer alone), ``tokenizer.safetensors``, ``config.json`` with the
settings, the model card ``README.md`` and the images in it. The loaded model generates the same images as the run, bit
for bit.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from llamagen.checkpoints.contents import build_model
from llamagen.checkpoints.weights import Weights, read_weights
from llamagen.checkpoints.writing import write_weights
from llamagen.files import atomic_file, atomic_folder
from llamagen.grids import save_png
from llamagen.hub.address import SCHEME, file_address, is_remote
from llamagen.hub.published import PUBLISHED
from llamagen.hub.upload import check_upload, upload_folder
from llamagen.models.gpt import GPT
from llamagen.models.vqgan import VQGAN
from llamagen.option_checks import check_integer
from llamagen.output_paths import check_output
from llamagen.pretrained.card import Card, with_address
from llamagen.pretrained.exported_config import (
    CONFIG_FILE,
    MODEL_FILE,
    TOKENIZER_FILE,
    is_exported,
    read_config,
    write_config,
)
from llamagen.pretrained.loading import check_tokenizer, read_gpt_weights
from llamagen.pretrained.model import LlamaGen
from llamagen.pretrained.run_facts import RunFacts, data_meta, read_run_facts, sample_prompts
from llamagen.pretrained.run_folder import Run, run_of
from llamagen.pretrained.sample_images import sample_images
from llamagen.pretrained.source import Source, find_source
from llamagen.sampling import IMAGE_SETTINGS
from llamagen.state_dicts import tensors_checksum

CARD_FILE = "README.md"
SAMPLES_FILE = "samples.png"
RECONSTRUCTIONS_FILE = "reconstructions.png"


@dataclass(frozen=True)
class Export:
    """What to export, and how.

    Attributes:
        checkpoint: what ``LlamaGen.from_pretrained`` loads: a checkpoint, a run's folder, a published name or file, or
            an exported folder, which is copied as it is, with its card.
        tokenizer: file or published name of the tokenizer, if it is not the one that the run names.
        text_encoder: name of a text model's encoder, instead of the run's.
        averaged: take averaged (EMA) weights if the checkpoint has them. The tokenizer of an autoregressive model is
            always the averaged one, whose codes the model was trained on.
        name: name of the model; None for that of the folder or repository.
        license: licence of the weights as the hub names it, such as ``mit``; None to state none.
        samples: number of sample images in the card.
        conditions: classes or prompts of the samples. By default classes spread over all classes, or the prompts of
            the run's ``SampleGrid``.
        unguided: for use without guidance: the default ``guidance_scale`` becomes 1, and vLLM computes only the
            conditional branch, with half the memory and arithmetic. The weights are the same.
    """

    checkpoint: str
    tokenizer: str | None = None
    text_encoder: str | None = None
    averaged: bool = True
    name: str | None = None
    license: str | None = None
    samples: int = 8
    conditions: tuple[str, ...] = ()
    unguided: bool = False

    def __post_init__(self) -> None:
        """Check the options."""
        check_integer("samples", self.samples, 0)
        if self.license is not None and not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license):
            raise ValueError(
                f"license is {self.license!r}; give a licence as the hub names it, such as mit, apache-2.0 or other"
            )
        if self.name is not None and (not self.name.strip() or not self.name.isprintable()):
            raise ValueError(f"name is {self.name!r}; give a text of one line")


def export_model(export: Export, to: str | Path, overwrite: bool = False) -> None:
    """Write an exported model to a folder, or upload it. Prints what is done.

    Args:
        export: what to export.
        to: a folder, which appears when it is complete; or ``hf://owner/repository``, which gets a commit.
        overwrite: replace a folder that holds an exported model.

    Raises:
        ValueError: in one line, if the model cannot be loaded, or the folder or repository cannot be written.
        DiskFullError: in one line, if the disk is full.
        FloatingPointError: if logits or pixels of the samples are not finite.
    """
    if str(to).startswith(SCHEME):
        if overwrite:
            raise ValueError("overwrite is for folders; an upload adds a commit to the repository, leave it out")
        address = check_upload(str(to)).repository
        with TemporaryDirectory() as temporary:
            folder = Path(temporary, address.rpartition("/")[2])
            folder.mkdir()
            _fill(folder, export, address, is_shared=True)
            print(f"uploading to {SCHEME}{address}", flush=True)
            page = upload_folder(folder, str(to))
        print(f"uploaded: {page}")
        return
    folder = Path(to).expanduser()
    _check_folder(folder, overwrite)
    with atomic_folder(folder) as temporary_folder:
        # Named without its parents, which are of no use to others.
        _fill(temporary_folder, export, folder.absolute().name)
    print(f"{folder}: load it with LlamaGen.from_pretrained, look at its {CARD_FILE} before you share it")


def _check_folder(folder: Path, overwrite: bool) -> None:
    check_output(folder, "to")
    if not folder.exists():
        return
    if not folder.is_dir() or not is_exported(folder):
        raise ValueError(f"{folder} exists and is not an exported model; choose another folder")
    if not overwrite:
        raise ValueError(f"{folder} exists already; choose another folder, or give --overwrite to replace it")


def _fill(folder: Path, export: Export, address: str, is_shared: bool = False) -> None:
    """Write all files of an exported model into an empty folder.

    Args:
        folder: the folder.
        export: what to export.
        address: how the model will be loaded.
        is_shared: whether others will load it, who have no files of this machine.
    """
    given = Path(export.checkpoint).expanduser()
    if given.is_dir() and (given / CONFIG_FILE).is_file():
        _copy(given, folder, export, address)
        return
    source = find_source(export.checkpoint, export.tokenizer)
    weights, tokenizer = read_gpt_weights(source, export.averaged)
    file = tokenizer if weights is None else source.model
    assert file is not None
    run = run_of(file)
    if weights is None and export.unguided:
        raise ValueError(f"{export.checkpoint} is a tokenizer, which has no guidance; leave --unguided out")
    settings = {} if weights is None else _settings(source, weights, export, run)
    _check_encoder(settings, is_shared)
    # The codes that a model was trained on are those of the averages.
    tokenizer_weights = read_weights(tokenizer, export.averaged or weights is not None)
    vqgan = build_model(tokenizer_weights)
    assert isinstance(vqgan, VQGAN)
    if weights is not None:
        check_tokenizer(weights, vqgan, tokenizer)
        if export.text_encoder is not None and weights.captions is not None:
            weights = weights._replace(captions={**weights.captions, "encoder": export.text_encoder})
    checksum = _write(vqgan, tokenizer_weights, folder / TOKENIZER_FILE)
    files, config = [TOKENIZER_FILE], None
    if weights is not None:
        gpt = build_model(weights)
        assert isinstance(gpt, GPT)
        checksum, config = _write(gpt, weights, folder / MODEL_FILE), gpt.config
        files.insert(0, MODEL_FILE)
    write_config(folder, export.name or address.rpartition("/")[2], files, settings, config, not export.unguided)
    facts = read_run_facts(run, file, export.averaged, checksum)
    _write_card(folder, export, address, facts, run, file)


def _copy(given: Path, temporary: Path, export: Export, address: str) -> None:
    """Copy an exported model with its card, which its author may have edited."""
    if export != Export(export.checkpoint):
        raise ValueError(
            f"{given} is an exported model, which is copied as it is; edit its {CARD_FILE} and {CONFIG_FILE}, and give "
            "no other options"
        )
    LlamaGen.from_pretrained(given, device="cpu")  # checks the files
    shutil.copytree(given, temporary, ignore=shutil.ignore_patterns(".*"), dirs_exist_ok=True)
    if (card := temporary / CARD_FILE).is_file():
        text = with_address(card.read_text(encoding="utf-8"), given.absolute().name, address)
        with atomic_file(card) as new:
            new.write_text(text, encoding="utf-8")


def _settings(source: Source, weights: Weights, export: Export, run: Run | None) -> dict[str, Any]:
    """Settings for ``config.json``."""
    encoder = dict(source.text_encoder)
    if export.text_encoder is not None:
        if not _is_text(weights):
            raise ValueError(
                f"text_encoder is {export.text_encoder}, but {weights.source} is class-conditional; leave it out"
            )
        encoder["name"] = export.text_encoder
    if encoder.get("name") and (local := Path(str(encoder["name"])).expanduser()).is_dir():
        encoder["name"] = str(local.absolute())
    # A window is a choice for a machine, not for a model, and earlier versions refuse what they do not know.
    sampling = {name: value for name, value in source.sampling.items() if name in IMAGE_SETTINGS}
    settings = {
        "sampling": sampling | ({"guidance_scale": 1.0} if export.unguided else {}),
        "dtype": source.dtype,
        "classes": () if _is_text(weights) else _class_names(source, weights, run),
        "text_encoder": encoder,
    }
    # The weights' file has the configuration of the model, so its resolution is known.
    return {name: value for name, value in settings.items() if value}


def _is_text(weights: Weights) -> bool:
    return (weights.config or {}).get("condition") == "text"


def _class_names(source: Source, weights: Weights, run: Run | None) -> tuple[str, ...]:
    """Names of the classes; empty if unknown. Older checkpoints have none, but the codes of their run may."""
    count = (weights.config or {}).get("num_classes")
    candidates = (source.classes, weights.classes, data_meta(run).get("classes") if run is not None else None)
    return next((tuple(names) for names in candidates if names and count and len(names) <= count), ())


def _check_encoder(settings: Mapping[str, Any], is_shared: bool) -> None:
    name = settings.get("text_encoder", {}).get("name")
    if is_shared and name and Path(name).is_dir():
        raise ValueError(
            f"the text encoder of the model is the folder {name}, which others do not have; give --text-encoder, its "
            "name on the hub, such as google/flan-t5-xl"
        )


def _write(model: GPT | VQGAN, weights: Weights, out: Path) -> str:
    """Write weights; return the checksum by which evaluations name them."""
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{out.name}: {type(model).__name__} of {count:,} parameters, from {weights.source}", flush=True)
    write_weights(model, weights, out)
    return tensors_checksum({name: weights.state[name] for name, _ in model.named_parameters()})


def _write_card(folder: Path, export: Export, address: str, facts: RunFacts, run: Run | None, file: Path) -> None:
    """Write the model card and its images, generated by the model as it will be loaded."""
    config = read_config(folder)
    model = LlamaGen.from_pretrained(folder)
    try:
        samples = sample_images(model, export.samples, export.conditions, sample_prompts(run))
    except (ValueError, ImportError) as error:
        raise ValueError(f"no sample images: {error}; or leave them out with --samples 0") from error
    if samples is not None:
        save_png(samples.grid, folder / SAMPLES_FILE)
    elif model.gpt is not None and export.samples:
        print("the card has no sample images: the run had no prompts; give some with --conditions", flush=True)
    if model.gpt is None and facts.reconstructions is not None:
        with atomic_file(folder / RECONSTRUCTIONS_FILE) as temporary:
            shutil.copyfile(facts.reconstructions, temporary)
    published = next((each for each in PUBLISHED.values() if each.file == file.name), None)
    encoder = config.get("text_encoder", {}).get("name")
    card = Card(
        model,
        address,
        facts,
        license=export.license,
        base=published.repository if published else _initial_repository(run),
        is_published=published is not None,
        samples=samples,
        samples_file=SAMPLES_FILE,
        reconstructions_file=RECONSTRUCTIONS_FILE if (folder / RECONSTRUCTIONS_FILE).is_file() else None,
        names_classes="classes" in config or published is not None,
        text_encoder=Path(encoder).name if encoder and Path(encoder).is_dir() else encoder,
    )
    with atomic_file(folder / CARD_FILE) as temporary:
        temporary.write_text(card.markdown(), encoding="utf-8")


def _initial_repository(run: Run | None) -> str | None:
    """Repository of the published weights that a run was initialised from."""
    start = run.options.get("init_from") if run is not None else None
    if start is None:
        return None
    if is_remote(str(start)) and (address := file_address(str(start))) is not None:
        return address.repository
    return next((each.repository for each in PUBLISHED.values() if each.file == Path(str(start)).name), None)
