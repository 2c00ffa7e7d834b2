"""The machinery: turns the mathematics of `decoding` and a model into generated text."""
