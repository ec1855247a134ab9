"""The report's tables, one kind a file."""
