"""Runtimes that run a network."""
