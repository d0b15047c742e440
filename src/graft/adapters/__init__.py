"""Adapters: the contract (base, hooks), the kinds, the pieces that they share, presets, and the registry of kinds."""
