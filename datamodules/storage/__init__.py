"""Where the bytes of a sample are stored, and how they are found: folders, tar shards, indexes, remote shards."""
