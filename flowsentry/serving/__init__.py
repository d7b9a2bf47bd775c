"""Serving: the Bento that answers, its client, where it is deployed, and the gate in front of production."""
