"""Prediction: a bundle and scenes in, honest maps out."""
