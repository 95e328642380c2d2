"""Faces in photos: models, detection, alignment, choice, and the detail pass."""
