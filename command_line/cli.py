"""LightningCLI with this project's parser, checks and defaults."""

import re
import sys
import warnings
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from traceback import walk_tb
from typing import Any

import lightning.pytorch as pl
import torch
from jsonargparse import ActionConfigFile, set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins.io import TorchCheckpointIO
from omegaconf.errors import OmegaConfBaseException

import datamodules
from callbacks import StopOnSignal
from callbacks.checkpoints import RunCheckpoint
from command_line.config_files import check_config_files, configs_of_stage, with_current_names
from command_line.interpolations import reason_of, register_interpolations
from command_line.run_config import RunConfig
from command_line.start_checks import StartChecks, check_folders
from lightning_modules import (
    ARGenModule,
    CheckpointFiles,
    models_on_meta_device,
    resolve_checkpoint,
    use_metrics_logger,
)
from lightning_modules.checkpoint_files import is_local, local_path
from lightning_modules.latest_checkpoint import KEYWORDS
from llamagen.checkpoints.contents import holds_only_weights, read_checkpoint
from llamagen.cores import available_cores, usable_cores
from llamagen.hub.download import is_remote
from llamagen.parser_errors import OneLineErrors

DATA_MODULES = tuple(getattr(datamodules, name) for name in datamodules.__all__)
"""DataModules, imported so that the command line finds them by their short names."""

PLAIN_SHARDED = "lightning.pytorch.strategies.ModelParallelStrategy"
SHARDED = "lightning_modules.ShardedStrategy"


class ConfigFile(ActionConfigFile):
    """``--config`` with files that extend others and have sections of stages."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        """Merge the configurations that a file stands for, one after the other, as if each had been given."""
        try:
            configs = configs_of_stage(values, parser.stage)
        except ValueError as error:
            parser.error(str(error))
        for config in configs:
            self.apply_config(parser, cfg, self.dest, config)


class Parser(OneLineErrors, LightningArgumentParser):
    """Lightning's parser with one-line errors. Configuration files may extend others and use older names.

    Attributes:
        stage: the stage whose options this parser has; None for the parser of the command line itself.
    """

    stage: str | None = None

    def add_argument(self, *args: Any, **kwargs: Any) -> Any:
        """Add an argument; Lightning's ``--config`` becomes a :class:`ConfigFile`."""
        if kwargs.get("action") is ActionConfigFile:
            kwargs["action"] = ConfigFile
        return super().add_argument(*args, **kwargs)

    def _load_config_parser_mode(self, content: str, path: Any = "", *args: Any, **kwargs: Any) -> Any:
        return super()._load_config_parser_mode(with_current_names(content, str(path)), path, *args, **kwargs)


class LlamaGenCLI(LightningCLI):
    """LightningCLI in which checkpoints never override the configuration, and keys cannot be abbreviated."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.stopping = StopOnSignal()
        given = kwargs.get("args")
        words = sys.argv[1:] if given is None else given
        self._stage = words[0] if isinstance(words, list) and words and words[0] in self.subcommands() else None
        settings = {"parser_class": Parser, "trainer_defaults": {"callbacks": [self.stopping, StartChecks()]}}
        super().__init__(*args, **{**settings, **kwargs})

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Build a parser that rejects abbreviations such as ``max_epoch`` and resolves ``${…}`` after merging files."""
        return super().init_parser(**kwargs, allow_abbrev=False, parser_mode="omegaconf+")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse arguments and configuration files; a ``${…}`` that has no value is an error of one line."""
        try:
            super().parse_arguments(parser, args)
        except OmegaConfBaseException as error:
            parser.error(reason_of(error))

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        # The options of a stage take long to collect, so only those of the given one are.
        if self._stage in (None, subcommand):
            parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
            assert isinstance(parser, Parser)
            parser.stage = subcommand
            return parser
        self._subcommand_method_arguments[subcommand] = []
        return self.init_parser(**kwargs)

    def _parse_ckpt_path(self) -> None:
        # Lightning would let hyperparameters in the checkpoint override the configuration. This only checks options.
        if self.config.get("subcommand") is None:
            return
        config = self.config[self.config.subcommand]
        path = config.get("ckpt_path")
        if isinstance(path, Path):
            path = config["ckpt_path"] = _as_text(path)
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
        if path and path not in KEYWORDS and ("://" not in str(path) or is_remote(path)):
            self._check_checkpoint(config, path)
        starts = config.get("model.init_args.init_from") and not config.get("model.init_args.lora")
        if config.get("ckpt_path") and self.config.subcommand != "fit" and starts:
            # The checkpoint has all weights; those a fine-tuned run started from need not be read, or downloaded. With
            # LoRA it has adapters only.
            config["model.init_args.init_from"] = None
            if config.get("model.init_args.init_adapt"):
                config["model.init_args.init_adapt"] = []

    def _check_checkpoint(self, config: Any, path: Any) -> None:
        """Check that a checkpoint can be read; one that holds only weights is given to ``init_from``, except in fit."""
        try:
            only_weights = holds_only_weights(path)
            if not only_weights:
                read_checkpoint(path, wanted=lambda _: False)
        except ValueError as error:
            self.parser.error(f"--ckpt_path: {error}")
        if not only_weights:
            return
        if self.config.subcommand == "fit" or "init_from" not in (config.model.get("init_args") or {}):
            self.parser.error(
                f"--ckpt_path: {path} holds only weights, not the state of a run to resume; start a new run from them "
                f"with --model.init_args.init_from {path}"
            )
        config["model.init_args.init_from"], config["ckpt_path"] = str(path), None

    def _check_frozen(self, config: Any) -> None:
        name = config.model.class_path.rpartition(".")[2]
        if self.config.subcommand != "predict":
            self.parser.error(f"{name} has nothing to train or to evaluate; {self.config.subcommand} another model")
        if config.get("ckpt_path"):
            self.parser.error(f"{name} is in no checkpoint; leave --ckpt_path out")

    def instantiate_classes(self) -> None:
        """Build trainer, model and data. Errors are reported without the text that the parser puts around them."""
        strategy = self.config[self.subcommand].trainer.strategy if self.subcommand else None
        sharded = strategy == "sharded" or getattr(strategy, "class_path", None) == SHARDED
        try:
            # A sharded model is allocated in configure_model, one tensor at a time.
            with models_on_meta_device() if sharded else nullcontext():
                super().instantiate_classes()
            if sharded and not isinstance(self.model, ARGenModule):
                raise ValueError(
                    f"{type(self.model).__name__} is small enough for each GPU; set trainer.strategy to ddp, not to "
                    "one that shards parameters"
                )
        except ValueError as error:
            reason = error
            while _is_of_parser(reason) and isinstance(reason.__cause__, ValueError):
                reason = reason.__cause__
            self.parser.error(str(reason))

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        """Build a trainer with atomic checkpoints, which reads sharded ones with any strategy; check its folders."""
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles()
        use_metrics_logger(trainer)
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, RunCheckpoint):
                callback.resolve_folder(trainer)
        check_folders(trainer)
        return trainer

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        path = kwargs["ckpt_path"] = resolve_checkpoint(kwargs.get("ckpt_path"), self.trainer, subcommand)
        if isinstance(self.model, ARGenModule) and path not in (None, *KEYWORDS) and is_local(path):
            self.model.take_class_names(local_path(path))
        return kwargs

    def before_instantiate_classes(self) -> None:
        """Set defaults that depend on the stage: predictions are not collected in memory, checkpoints are atomic."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        if self.subcommand == "predict":
            config.return_predictions = False
        strategy = config.trainer.strategy
        if getattr(strategy, "class_path", None) == PLAIN_SHARDED:
            strategy.class_path = SHARDED
        _share_limited_cores(config.trainer.devices)

    def after_fit(self) -> None:
        """Exit with a signal's code if a signal ended the run, so that ``fit && predict`` stops.

        Raises:
            SystemExit: after a signal, with code 143 for SIGTERM and 130 for SIGINT.
        """
        if self.stopping.received is not None:
            raise SystemExit(128 + self.stopping.received)


def _share_limited_cores(devices: Any) -> None:
    """Divide the cores that a container allows among the processes of this node.

    Lightning divides the cores of the machine, but does not know the limit of a container.
    """
    if isinstance(devices, int) and devices > 1 and (cores := usable_cores()) < available_cores():
        torch.set_num_threads(max(1, cores // devices))


def _is_of_parser(error: ValueError) -> bool:
    """Whether jsonargparse raised an error. It wraps the error of a class in its own."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("jsonargparse.")


def _is_frozen(class_path: str | None) -> bool:
    """Whether a module's class is predict-only: it sets ``is_frozen``, and needs no checkpoint."""
    module, _, name = (class_path or "").rpartition(".")
    return bool(module) and getattr(getattr(import_module(module), name), "is_frozen", False)


def run_stage(args: list[str] | dict[str, Any] | None = None) -> LlamaGenCLI:
    """Run a stage.

    Args:
        args: arguments; None for those of the command line.

    Returns:
        The command line, with trainer, model and data.
    """
    # predict and test leave out callbacks of training on purpose.
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks")
    # `${trainer.default_root_dir}` in a file means the key of the stage, such as `fit.trainer.default_root_dir`.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    register_interpolations()
    check_config_files(sys.argv[1:] if args is None else args)
    return LlamaGenCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=RunConfig,
        auto_configure_optimizers=False,
        args=args,
    )


def _as_text(path: Path) -> str:
    """A path or address as it was given.

    footgun: Python caches unions without regard to the order of their types. If some package uses ``Path | str`` before
    Lightning is imported, its ``str | Path`` is read as a path, which makes ``hf:/owner`` of ``hf://owner``.
    """
    return re.sub(r"^([a-z][a-z0-9]+):/", r"\1://", str(path))
