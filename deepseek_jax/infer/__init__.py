"""Serves models: sampling, chat, placement of redundant experts."""
