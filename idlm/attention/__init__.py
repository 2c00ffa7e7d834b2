"""Attention over a paged KV cache: one file per back-end, each with `prepare` and `attend`."""
