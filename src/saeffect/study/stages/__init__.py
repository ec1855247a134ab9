"""The stages of a study, one a file; each reads files, writes files and is skipped when its inputs stand."""
