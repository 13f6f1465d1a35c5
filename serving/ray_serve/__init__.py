"""The server on many machines, with Ray Serve."""
