"""The feature browser: all features of all arms, found as one types, and a page for each.

The tables of a run directory enter; pages, and the same as JSON, leave. No model is needed.
"""
