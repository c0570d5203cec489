"""`kelp sweep`: a search for better options of `kelp train`."""
