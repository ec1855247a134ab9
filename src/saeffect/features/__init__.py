"""What each feature is: the tokens it promotes, where it fires, how coherent its tokens are, which domain they are of.

`projection` computes top tokens from the decoder, `activity` collects statistics of features on text, `table` joins the
two; `coherence` (with `embeddings`) scores features and `vocabulary` selects those of a domain.
"""
