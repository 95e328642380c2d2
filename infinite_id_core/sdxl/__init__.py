"""What is SDXL's own: layer names and noise levels."""
