"""The command line: one file a command, thin over a function of the package; `app.py` wires them, `console.py` shows.

What is typed enters; results leave on standard output, progress and errors on standard error.
"""
