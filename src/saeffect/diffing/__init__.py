"""What changed between two models, feature by feature: one method a file, registered in `methods`.

In: a `ModelPair`, the SAEs of control and treatment with their activations on one text, and further SAEs of the
control's model as the null. Out: tables, one row a feature with its change, p, q and reason. `cross_activity` reads one
SAE on both models, `correspondence` matches the features of two SAEs, `stagewise` follows a warm-started one.
"""
