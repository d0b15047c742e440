"""A batch through the model to the loss of each target, and how it is proved and made fast."""
