"""Building blocks that several kinds share."""
