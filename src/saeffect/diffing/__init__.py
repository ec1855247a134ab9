"""What changed between two models, one method a file: features matched, followed and compared."""
