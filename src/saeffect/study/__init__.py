"""Studies: one comparison of two models from a study file to a report. Start with `run.py`, the method section.

A study file enters (`study.py`), is checked without computing (`check.py`), and its stages (`stages/`) write a run
directory (`run_folder.py`), which is all that leaves. The text of a study and its tokens are in `texts.py` and
`tokens.py`; how its SAEs are trained, in `training.py`.
"""
