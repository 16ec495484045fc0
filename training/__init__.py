"""Training: the emoji world, the recipe of the tiny model, and tuning on anybody's conversations. See README.md."""
