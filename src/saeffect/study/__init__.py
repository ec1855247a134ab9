"""Studies: the stages in order, and the run directory they read and write. Start with `run.py`."""
