"""The grid of tiles, the sliced engine and the merge. Needs numpy only."""
