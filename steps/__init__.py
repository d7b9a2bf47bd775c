"""ZenML steps: each turns configuration and artifacts into calls of `flowsentry`."""
