"""Runs pipelines: schedules as data, stages of a model, steps through them."""
