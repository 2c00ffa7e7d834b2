"""What people look at: the terminal chat, and the colours of drafts."""
