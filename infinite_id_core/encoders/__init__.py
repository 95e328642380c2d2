"""Image and text towers, and faces to an identity."""
