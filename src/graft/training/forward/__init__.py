"""From a batch through the model to the loss of each target; proofs of the layout, the head, the kernels and the compiled graph."""
