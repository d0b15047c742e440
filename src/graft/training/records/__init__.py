"""What a run writes down: metrics, events, progress, trackers, the model card."""
