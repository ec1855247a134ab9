"""The stages of a study; each reads files, writes files and is skipped while its inputs are unchanged.

`<stage>_inputs` gives everything that the numbers depend on, `run_<stage>` writes the files and gives their paths.
A stage's VERSION goes up when the same inputs give other numbers or files.
"""
