"""FlowSentry: detects attacks on Kubernetes clusters from network flows."""

__version__ = "0.1.0"
