"""Training SAEs: from a recipe (`recipe`) over the loop (`train`) and one step (`step`) to weights and their card."""
