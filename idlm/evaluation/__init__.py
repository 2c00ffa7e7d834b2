"""Measurements of a model's decoding: same bytes, tokens per forward, speed, exact answers."""
