"""The command line: one file a command, a thin layer over a function; `app.py` registers them, `console.py` prints.

Results go to standard output, progress and errors to standard error.
"""
