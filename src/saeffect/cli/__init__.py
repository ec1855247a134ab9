"""The command line: one file a command, thin over a function of the package; `app.py` wires, `console.py` shows."""
