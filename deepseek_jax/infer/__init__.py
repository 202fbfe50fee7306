"""Inference: sampling, chat, placement of redundant experts."""
