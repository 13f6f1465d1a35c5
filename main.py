"""The command line of all stages: ``python main.py fit|validate|test|predict --config … [--config …]``."""

from llamagen.cores import share_cores

share_cores()  # before torch is loaded, which is when OpenMP reads its settings

from command_line import main  # noqa: E402
from llamagen.command import run_command  # noqa: E402

__all__ = ["main"]

if __name__ == "__main__":
    run_command(main)
