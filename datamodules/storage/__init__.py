"""Storage of examples: folders, tar shards, indexes of them, and remote shards."""
