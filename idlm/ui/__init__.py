"""The terminal chat, the colours of tokens by their source, and the built page in `page/`."""
