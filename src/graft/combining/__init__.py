"""One lasting adapter made of several trained ones."""
