"""The first page: the answer, tables and figures of the report, and how far the study is."""
