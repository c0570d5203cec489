"""Scores of masks and probabilities against truth. Needs no torch."""
