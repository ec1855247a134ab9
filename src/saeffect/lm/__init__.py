"""Language models: loaded from anywhere, read and edited at hooks, fine-tuned, and run over text.

`loading` (with `accounting`, `adapters`, `gguf`) opens a model; `architectures` and `hooks` say where to read inside
it; `tokens`, `corpora`, `activations` and `harvest` turn text into batches of activations.
"""
