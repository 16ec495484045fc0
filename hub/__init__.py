"""A checkpoint's folder: finding it, reading and checking its settings in every layout, writing it; and odd pictures.

The model in the six core files knows only tidy inputs. Everything that copes with untidy ones is here. See README.md.
"""
