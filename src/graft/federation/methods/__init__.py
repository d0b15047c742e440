"""The methods of federated training, one file each."""
