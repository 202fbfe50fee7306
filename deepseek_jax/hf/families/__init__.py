"""One module per family of Hugging Face checkpoints."""
