"""Probabilities and how good they are: predicting, scoring, calibrating, pooling."""
