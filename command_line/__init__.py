"""The command line of all stages: what a command is made of, checked before it starts, and saved of it."""

from command_line.cli import LlamaGenCLI, run_stage

__all__ = ["LlamaGenCLI", "run_stage"]
