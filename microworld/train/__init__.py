"""Training of every model of the microworld: `python -m microworld train --everything`."""
