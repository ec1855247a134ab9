"""What each feature is: the tokens it promotes, where it fires, how coherent and how much of a domain it is.

`projection` reads tokens off the decoder, `activity` watches the features on text, `table` joins the two; `coherence`
(with `embeddings`) scores rows and `vocabulary` selects those of a domain.
"""
