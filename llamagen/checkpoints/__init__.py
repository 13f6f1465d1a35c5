"""Weights in and out: reading any file of weights, what a checkpoint holds, sharded checkpoints, export."""
