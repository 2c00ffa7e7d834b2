"""Parts of the server's benchmarks: a server process, a light HTTP client, faults, and reports."""
