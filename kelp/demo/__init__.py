"""`kelp demo`: the whole pipeline, small, on simulated coasts and one real scene, to a report."""
