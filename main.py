"""The command line of all stages: ``python main.py fit|validate|test|predict --config … [--config …]``."""

import warnings
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from traceback import walk_tb
from typing import Any

import lightning.pytorch as pl
import yaml
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO

import callbacks  # noqa: F401  makes the classes known by their short names
import datamodules  # noqa: F401
from lightning_modules import (
    ARGenModule,
    CheckpointFiles,
    chosen_checkpoint,
    models_without_memory,
    use_metrics_logger,
)
from llamagen.checkpoint import read_checkpoint
from llamagen.files import whole_file

PLAIN_SHARDED = "lightning.pytorch.strategies.ModelParallelStrategy"
SHARDED = "lightning_modules.ShardedStrategy"


class RunConfig(SaveConfigCallback):
    """Write the whole configuration of a stage into the run's folder, as ``fit.yaml``, ``predict.yaml`` and so on.

    It is written when data, model and checkpoint have been found to be in order: a run that cannot start leaves nothing
    behind. A new run does not write over an old one.
    """

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse the folder of another run.

        Raises:
            ValueError: if ``fit`` starts anew where a run already is.
        """
        if stage == "fit" and self.config.get("ckpt_path") is None and self._path(trainer).exists():
            folder = trainer.default_root_dir
            raise ValueError(
                f"{folder} already holds a run; choose another --trainer.default_root_dir, or go on with it by "
                "--ckpt_path last"
            )

    @staticmethod
    def _path(trainer: pl.Trainer) -> Path:
        assert trainer.state.fn is not None
        return Path(trainer.default_root_dir) / f"{trainer.state.fn.value}.yaml"

    def _save(self, trainer: pl.Trainer) -> None:
        if self.already_saved or not trainer.is_global_zero:
            return
        self.already_saved = True
        text = self.parser.dump(self.config, skip_none=False)
        with whole_file(self._path(trainer)) as temporary:
            temporary.write_text(text)
        for logger in trainer.loggers:
            if not isinstance(logger, CSVLogger):
                logger.log_hyperparams(yaml.safe_load(text))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Remove the folders that a logger has made for a run that did not start."""
        if self.already_saved or not trainer.is_global_zero:
            return
        # Not `trainer.log_dir`: it waits for the other processes, which may not be here.
        made = next((logger.log_dir for logger in trainer.loggers if logger.log_dir), trainer.default_root_dir)
        root, folder = Path(trainer.default_root_dir).absolute(), Path(made).absolute()
        while folder.is_relative_to(root) and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
            folder = folder.parent

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``fit.yaml``."""
        self._save(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``validate.yaml``."""
        if trainer.state.fn == "validate":
            self._save(trainer)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``test.yaml``."""
        self._save(trainer)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write ``predict.yaml``."""
        self._save(trainer)


class LlamaGenCLI(LightningCLI):
    """LightningCLI in which the command line always wins over what a checkpoint says, and no key may be abbreviated."""

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """A parser that does not take `max_epoch` for `max_epochs`, and resolves `${…}` when all files are merged."""
        return super().init_parser(**kwargs, allow_abbrev=False, parser_mode="omegaconf+")

    def _parse_ckpt_path(self) -> None:
        # Lightning would let the checkpoint's hyperparameters override the configuration. Ours are checked, not obeyed.
        if self.config.get("subcommand") is None:
            return
        config = self.config[self.config.subcommand]
        path = config.get("ckpt_path")
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


def _is_of_parser(error: ValueError) -> bool:
    """Whether jsonargparse raised an error, around that of a class: what a class was led to its own by is a detail."""
    *_, (frame, _) = walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__")).startswith("jsonargparse.")


def _is_frozen(class_path: str | None) -> bool:
    """Whether a class of modules says that what it holds is only used: by ``predict``, without a checkpoint."""
    module, _, name = (class_path or "").rpartition(".")
    return bool(module) and getattr(getattr(import_module(module), name), "is_frozen", False)


def main(args: list[str] | dict[str, Any] | None = None) -> LlamaGenCLI:
    """Run a stage.

    Args:
        args: instead of the command line's.
    """
    # What predict does not need of a training run, its configuration leaves out on purpose.
    warnings.filterwarnings("ignore", "Be aware that when using `ckpt_path`, callbacks")
    # `${trainer.default_root_dir}` in a YAML file means the key of the same stage, `fit.trainer.default_root_dir`.
    set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
    return LlamaGenCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=RunConfig,
        auto_configure_optimizers=False,
        args=args,
    )


if __name__ == "__main__":
    main()
