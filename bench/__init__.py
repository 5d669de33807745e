"""Measured claims about speed and about kills: `python -m bench.<name> [--small]`, one JSON line for each claim."""
