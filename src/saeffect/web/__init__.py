"""The web app over a run directory: look at features, review them with others, and steer both models.

In: a run directory, which another process may be writing. Out: pages, and JSON under `/api/`. One area is one package
with a `router`; `app.py` includes them and `site.py` is what they all read from.
"""
