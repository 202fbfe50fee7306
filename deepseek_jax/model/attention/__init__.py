"""Holds attentions, one idea per file, and what they share."""
