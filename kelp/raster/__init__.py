"""Scenes, masks and statistics: what is read from and written to rasters."""
