"""Serve a base and its adapters over HTTP: the API that OpenAI's clients speak, and pages to look at."""
