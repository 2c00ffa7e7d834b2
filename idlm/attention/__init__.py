"""Attention over a paged KV cache: one back-end a file, behind `prepare` and `attend`."""
