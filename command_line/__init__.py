"""The command line of all stages: parsing, checks before a run starts, and the saved configuration."""

from command_line.cli import LlamaGenCLI, run_stage

__all__ = ["LlamaGenCLI", "run_stage"]
