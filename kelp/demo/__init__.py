"""`kelp demo`: the whole road, small, on simulated coasts and one real scene, to a report."""
