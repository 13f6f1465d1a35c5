"""Order of the training examples, streams of shards, and loaders."""
