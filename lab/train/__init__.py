"""Training of every model of the microworld: `python -m lab train --everything`."""
