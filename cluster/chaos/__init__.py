"""Faults on a local cluster under load, and what its clients saw."""
