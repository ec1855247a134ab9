"""Statistics with intervals, p-values and reasons.

Functions take arrays of numbers and return an `Estimate` (with interval, p, or the reason why there is none), a p, or a
table of them. Wherever two groups are compared, `a` is the reference and positive means that `b` is larger.

Intervals are at 95 %. `n_boot` is the number of resamples (at least 40) and `seed` an integer or a numpy generator;
equal seeds give equal numbers. `alpha` is the error rate of a test and `power` the probability that it detects an
effect. A `Resampling` holds the seed and the numbers of resamples, and the `name` beside it gives a number its own
random stream. An argument of the wrong shape or kind raises a `ShapeMismatch`, `Undefined`, `UnknownName` or
`ConfigError` that names it; where the data do not define the statistic, the result is NaN with the reason.
"""
