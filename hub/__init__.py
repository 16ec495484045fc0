"""Everything about files that is not the model. See README.md."""
