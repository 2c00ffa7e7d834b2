"""What a model's decoding is worth, measured: same bytes, tokens per forward, speed, exact answers."""
