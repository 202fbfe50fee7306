"""Pipelines: schedules as data, stages of a model, the step through them."""
