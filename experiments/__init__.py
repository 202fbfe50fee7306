"""Launchers: a module per verb, absl flags, one configuration file per run."""
