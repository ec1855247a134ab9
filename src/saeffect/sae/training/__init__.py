"""Training SAEs: from a recipe (`recipe`) over the loop (`train`) and one step (`step`) to weights and their card.

In comes a `SaeRecipe`, or activations with `SaeJob`s; out come folders that `saeffect.sae.formats` reads, each with its
metrics, its curves, a model card, and a note of what made it.
"""
