"""The terminal chat, and the colours of tokens by their source."""
