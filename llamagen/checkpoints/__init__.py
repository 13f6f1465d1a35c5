"""Reading, checking, converting and exporting weights and checkpoints."""
