"""People's answers about features: is this one of the domain, and what would you call it?

`verdicts` reads, writes and sums up CSV files; `store` keeps what people say in the app, `queue` is what they are
asked, `agreement` says how far they can be trusted.
"""
