"""What Graft puts into a model: the container of each adapted module, generated classes, and the state of the model."""
