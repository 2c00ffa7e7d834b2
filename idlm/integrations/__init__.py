"""Inside the engines and frameworks that people already run, each as an extra."""
