"""Clients of the server, each at a pinned version: see `__main__`."""
