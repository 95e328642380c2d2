"""How the embedded default was made, and what it proves: ``python -m lab``."""
