"""The playground: both models of a run answer side by side, with and without a feature, token by token.

In: what a user asks for (`Ask`) and a run directory. Out: events of a stream, and results that can be kept. One thread
(`worker.py`) runs the models (`engine.py`), a token of every open request in turn.
"""
