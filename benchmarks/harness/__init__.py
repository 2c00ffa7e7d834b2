"""What the server's benchmarks share: a server as a process, a light HTTP client, and how results
are written."""
