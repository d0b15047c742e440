"""What stands in the model: the container at each adapted module, class substitution, the model's state."""
