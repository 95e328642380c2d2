"""The method of Infinite-ID (arXiv 2403.11781): attention, adapter, identity, files.

Nothing here imports ComfyUI or diffusers except ``host_comfyui`` and ``host_diffusers``.
"""
