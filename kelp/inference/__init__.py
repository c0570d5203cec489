"""Prediction: bundles applied to scenes."""
