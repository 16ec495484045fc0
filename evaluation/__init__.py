"""How good a model is, as numbers."""
