"""The report's sentences, numbers and terms."""
