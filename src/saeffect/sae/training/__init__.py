"""Training SAEs: the recipe, one step, the loop, its log, checkpoints and the card of the result."""
