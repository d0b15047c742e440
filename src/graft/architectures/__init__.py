"""Where an adapter may sit: model families, the table of sites, the site language."""
