"""Training: the emoji world, the recipe of the tiny model, and tuning on your own conversations. See README.md."""
