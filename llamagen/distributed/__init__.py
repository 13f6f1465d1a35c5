"""What several ranks need: reductions with gradients, full tensors of sharded ones, synchronised BatchNorm."""
