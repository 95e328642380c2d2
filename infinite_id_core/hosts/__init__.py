"""The method inside ComfyUI and inside diffusers."""
