"""Serves a model over HTTP in OpenAI's manner, with a page to chat on."""
