"""Language models: loading, hooks, adapters, texts as tokens, fine-tuning, and activations as they stream by."""
