"""Commands from the saved configurations of runs, which are parsed faster than options one at a time."""

from pathlib import Path


def again(stage: str, run: Path, folder: Path) -> list[str]:
    """Arguments of a stage in another folder, with the saved configuration of a run.

    Args:
        stage: fit, validate, test or predict.
        run: folder of the run. Its configuration is that of the stage; if it has none, that of its training.
        folder: folder of the new run.
    """
    config = run / f"{stage}.yaml"
    return [
        stage,
        "--config",
        str(config if config.exists() else run / "fit.yaml"),
        f"--trainer.default_root_dir={folder}",
    ]
