"""Holds one module per family of Hugging Face checkpoints."""
