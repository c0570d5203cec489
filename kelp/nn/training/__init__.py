"""Training: one tracked run, ending in a bundle."""
