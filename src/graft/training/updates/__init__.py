"""What a step does with its gradients: optimisers by name, their states, and the schedules of the learning rate."""
