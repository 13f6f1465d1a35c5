"""Code for several ranks: differentiable reductions, copies into sharded tensors, synchronised BatchNorm."""
