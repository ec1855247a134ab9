"""SAE files of others and ours, one format a file."""
