"""Pieces that several kinds share."""
