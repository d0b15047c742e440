"""Task definitions for lm-eval (the YAML files) and the functions that they name."""
