"""Language models: loaded from anywhere, read and edited at hooks, fine-tuned, and run over text.

In come a `ModelConfig` (hub id, folder, adapter, GGUF file or bundled name) and sources of text; out go a
`LanguageModel`, activations at a hook (at once, as shards on disk, or as a stream), rows of tokens, and LoRA adapters.

Read `loading` (with `accounting`, `adapters`, `gguf`) for how a model is opened; `architectures` and `hooks` for where
to listen inside it; `tokens`, `corpora`, `activations` and `harvest` for the way from text to batches of activations.
"""
