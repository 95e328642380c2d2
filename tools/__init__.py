"""Helpers around a live ComfyUI, for `run.py demo` and the server tests; not part of the pack."""
