"""The training step: objective, optimizer, schedules, gate, evaluation."""
