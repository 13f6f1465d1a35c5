"""LightningCLI as this project uses it."""

import sys
import warnings
from contextlib import nullcontext
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from traceback import walk_tb
from typing import Any

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import TorchCheckpointIO

from callbacks import StopOnSignal
from callbacks.checkpoints import RunCheckpoint
from command_line.run_config import RunConfig
from command_line.start_checks import StartChecks, check_places
from datamodules import (
    CaptionDataModule,
    ClassRequestDataModule,
    CodeDataModule,
    DigitsDataModule,
    ImageDataModule,
    PromptDataModule,
)
from lightning_modules import (
    ARGenModule,
    CheckpointFiles,
    chosen_checkpoint,
    models_without_memory,
    use_metrics_logger,
)
from llamagen.checkpoints.contents import read_checkpoint
from llamagen.cores import available_cores, usable_cores
from llamagen.parser_errors import OneLineErrors

DATA_MODULES = (
    CaptionDataModule,
    CodeDataModule,
    DigitsDataModule,
    ImageDataModule,
    PromptDataModule,
    ClassRequestDataModule,
)
"""Imported, and so known by their short names; they are loaded only where they are asked for."""

PLAIN_SHARDED = "lightning.pytorch.strategies.ModelParallelStrategy"
SHARDED = "lightning_modules.ShardedStrategy"


class Parser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser, whose errors are one line."""


class LlamaGenCLI(LightningCLI):
    """LightningCLI in which the command line always wins over what a checkpoint says, and no key may be abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stopping = StopOnSignal()
        settings = {"parser_class": Parser, "trainer_defaults": {"callbacks": [self.stopping, StartChecks()]}}
        super().__init__(*args, **{**settings, **kwargs})

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that does not take `max_epoch` for `max_epochs`, and resolves `${…}` when all files are merged."""
        return super().init_parser(**kwargs, allow_abbrev=False, parser_mode="omegaconf+")

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the checkpoint's hyperparameters override the configuration. Ours are checked, not obeyed.
        if self.config.get("subcommand") is None:
            return
        config = self.config[self.config.subcommand]
        path = config.get("ckpt_path")
        if self.config.subcommand in ("test", "predict") and config.get("trainer.default_root_dir") is None:
            # Overlays for these stages set it to null: results must not end up in the folder of the training run.
            self.parser.error(
                f"{self.config.subcommand} needs a folder for its results; give --trainer.default_root_dir FOLDER"
            )
        if _is_frozen(config.get("model.class_path")):
            self._check_frozen(config)
        elif path is None and self.config.subcommand != "fit" and not config.get("model.init_args.init_from"):
            self.parser.error(
                f"{self.config.subcommand} needs a trained model; give --ckpt_path, the .ckpt file of a run, or "
                "--model.init_args.init_from, a file of weights"
            )
        if path and path not in ("best", "last", "hpc", "registry") and "://" not in str(path):
            try:
                read_checkpoint(path, wanted=lambda _: False)
            except ValueError as error:
                self.parser.error(f"--ckpt_path: {error}")

    def _check_frozen(self, config: Any) -> None:
        name = config.model.class_path.rpartition(".")[2]
        if self.config.subcommand != "predict":
            self.parser.error(f"{name} has nothing to train or to measure; {self.config.subcommand} another model")
        if config.get("ckpt_path"):
            self.parser.error(f"{name} is in no checkpoint; leave --ckpt_path out")

    def instantiate_classes(self) -> None:
        """Say what is wrong with a model or its data in the words of the one who found out, not of each one above."""
        strategy = self.config[self.subcommand].trainer.strategy if self.subcommand else None
        sharded = strategy == "sharded" or getattr(strategy, "class_path", None) == SHARDED
        try:
            # What is to be spread over ranks gets its memory when it is.
            with models_without_memory() if sharded else nullcontext():
                super().instantiate_classes()
            if sharded and not isinstance(self.model, ARGenModule):
                raise ValueError(
                    f"{type(self.model).__name__} is small enough for each GPU; set trainer.strategy to ddp, not to "
                    "one that shards its parameters"
                )
        except ValueError as error:
            reason = error
            while _is_of_parser(reason) and isinstance(reason.__cause__, ValueError):
                reason = reason.__cause__
            self.parser.error(str(reason))

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """A trainer that reads sharded checkpoints, whatever its strategy."""
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles()
        use_metrics_logger(trainer)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, RunCheckpoint):
                callback.resolve_folder(trainer)
        check_places(trainer)
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        kwargs["ckpt_path"] = chosen_checkpoint(kwargs.get("ckpt_path"), self.trainer, subcommand)
        return kwargs

    def before_instantiate_classes(self) -> None:
        """Predictions go to their writers, and are not collected in memory; checkpoints get their names when whole."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        if self.subcommand == "predict":
            config.return_predictions = False
        strategy = config.trainer.strategy
        if getattr(strategy, "class_path", None) == PLAIN_SHARDED:
            strategy.class_path = SHARDED
        _share_limited_cores(config.trainer.devices)

    def after_fit(self) -> None:
        """Let the shell know of a run that a signal ended: ``fit && predict`` must not go on.

        Raises:
            SystemExit: with 143 after SIGTERM, 130 after SIGINT.
        """
        if self.stopping.received is not None:
            raise SystemExit(128 + self.stopping.received)


def _share_limited_cores(devices: Any) -> None:
    """Divide the cores that a container's limit leaves among the processes of this node.

    Lightning divides the others, but does not see such a limit.
    """
    if isinstance(devices, int) and devices > 1 and (cores := usable_cores()) < available_cores():
        torch.set_num_threads(max(1, cores // devices))


def _is_of_parser(error: ValueError) -> bool:
    """Whether jsonargparse raised an error, around that of a class: what a class was led to its own by is a detail."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("jsonargparse.")


def _is_frozen(class_path: str | None) -> bool:
    """Whether a class of modules says that what it holds is only used: by ``predict``, without a checkpoint."""
    module, _, name = (class_path or "").rpartition(".")
    return bool(module) and getattr(getattr(import_module(module), name), "is_frozen", False)


def _check_config_files(args: list[str] | dict[str, Any]) -> None:
    """Name a file that is no YAML: what reads it later tells the line alone.

    Raises:
        ValueError: in one line.
    """
    words = [word for arg in args for word in arg.split("=", 1)] if isinstance(args, list) else []
    for option, name in pairwise(words):
        if option in ("-c", "--config") and Path(name).is_file():
            try:
                holds_settings = isinstance(yaml.safe_load(Path(name).read_text()), dict | None)
                problem = "" if holds_settings else "it holds no settings"
            except (yaml.YAMLError, UnicodeDecodeError) as error:
                problem = str(error)
            if problem:
                raise ValueError(f"--config {name} cannot be read as YAML ({problem}); give a configuration file")


def run_stage(args: list[str] | dict[str, Any] | None = None) -> LlamaGenCLI:
    """Run a stage.

    Args:
        args: instead of the command line's.
    """
    # What predict does not need of a training run, its configuration leaves out on purpose.
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks")
    # `${trainer.default_root_dir}` in a YAML file means the key of the same stage, `fit.trainer.default_root_dir`.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    _check_config_files(sys.argv[1:] if args is None else args)
    return LlamaGenCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=RunConfig,
        auto_configure_optimizers=False,
        args=args,
    )
