"""The engine: runs requests with a model and the rules of `decoding`, many in one batch."""
