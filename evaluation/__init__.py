"""Measures how many questions a model answers correctly."""
