"""Forwards what configuration files made for earlier versions import."""

from deepseek_jax.cli.common import editable as editable
