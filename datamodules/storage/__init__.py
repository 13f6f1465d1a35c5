"""Where the bytes of an example are stored, and how they are found: folders, tar shards, indexes, remote shards."""
