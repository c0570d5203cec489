"""Simulated coastal scenes in competition layout: for tests, the demo and benchmarks only."""
