"""Models from a file, a folder or the embedded default."""
