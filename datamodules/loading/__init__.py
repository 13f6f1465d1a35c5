"""Which example comes when: the order of an epoch, streams, and the loader."""
