"""Other engines on the same workload, each in a process of its own that speaks lines of JSON
(`protocol`)."""
