"""Statistics that say how sure they are.

Arrays of numbers enter. What leaves is an `Estimate` (with interval, p, or the reason why there is none), a p, or a
table of them. Wherever two groups are compared, `a` is the reference and positive means that `b` is larger.

Intervals are at 95 %. `n_boot` is the number of resamples (at least 40) and `seed` an integer or a numpy generator;
equal seeds give equal numbers. `alpha` is the error rate of a test and `power` the probability that it finds something.
A `Resampling` holds the seed and the numbers of resamples, and the `name` beside it gives a number its own random
stream. An argument of the wrong shape or kind raises a `ShapeMismatch`, `Undefined`, `UnknownName` or `ConfigError`
that names it; data without an answer give NaN, with the reason.
"""
