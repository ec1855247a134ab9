"""The report's sentences: the answer, its threats, and how numbers, features, outcomes and terms are written."""
