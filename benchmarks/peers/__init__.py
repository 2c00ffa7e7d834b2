"""Other engines on the same workload, each in a process that speaks lines of JSON: see
`protocol`."""
