"""The names of the files of an adapter's folder in Graft's own format."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
