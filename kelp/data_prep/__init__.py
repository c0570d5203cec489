"""Data preparation, without torch: facts, groups, folds, tiles."""
