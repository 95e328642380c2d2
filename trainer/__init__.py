"""How the weights are made: ``python -m trainer prepare | train | inspect | convert | ...``."""
