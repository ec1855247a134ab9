"""People's answers about features: is this one of the domain, and what would you call it?

`verdicts` reads, writes and summarises CSV files; `store` keeps the verdicts given in the app, `queue` holds the
features to judge, `agreement` measures how far raters agree.
"""
