"""Checkpoint files, settings and pictures. See README.md."""
