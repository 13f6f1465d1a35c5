"""The command line of all stages: ``python main.py fit|validate|test|predict --config … [--config …]``."""

from typing import Any

from llamagen.command import run_command
from llamagen.cores import share_cores


def main(args: list[str] | None = None) -> Any:
    """Run a stage.

    Args:
        args: arguments; None for those of the command line.

    Returns:
        The :class:`~command_line.LlamaGenCLI`, with trainer, model and data.
    """
    share_cores()
    # footgun: import command_line only now. OpenMP reads its settings when torch is imported, and spawned worker
    # processes import this file but do not need Lightning.
    from command_line import run_stage

    return run_stage(args)


if __name__ == "__main__":
    run_command(main)
