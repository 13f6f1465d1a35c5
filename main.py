"""The command line of all stages: ``python main.py fit|validate|test|predict --config … [--config …]``."""

from typing import Any

from llamagen.command import run_command
from llamagen.cores import share_cores


def main(args: list[str] | None = None) -> Any:
    """Run a stage.

    Args:
        args: instead of the command line's.

    Returns:
        The :class:`~command_line.LlamaGenCLI`, with the trainer, the model and the data.
    """
    share_cores()
    # Imported here: OpenMP reads its settings when torch is loaded, and spawned worker processes import this file, but
    # need nothing of Lightning.
    from command_line import run_stage

    return run_stage(args)


if __name__ == "__main__":
    run_command(main)
