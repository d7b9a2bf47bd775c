"""Monitoring: what production says, held against what is known."""
