"""The method of Infinite-ID (arXiv 2403.11781) and everything it needs.

Only ``hosts`` imports ComfyUI or diffusers.
"""
