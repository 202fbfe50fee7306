"""Trains a model: objective, optimizer, schedules, gate, evaluation."""
