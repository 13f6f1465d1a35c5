"""The command line of all stages: what a command is made of, checked before it starts, and saved of it."""

from command_line.cli import LlamaGenCLI, main

__all__ = ["LlamaGenCLI", "main"]
