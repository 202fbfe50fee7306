"""Batches of made-up rollouts for tiny models."""

import jax
import numpy as np

from deepseek_jax.train.objective import next_token
from tests import tiny


def log_probs(model, variables, batch):
  """Returns float64 log-probs [B T V] of each next token, by NumPy."""
  inputs = next_token(batch)
  out = jax.jit(model.apply)(
    variables,
    inputs.tokens,
    positions=inputs.positions,
    segment_ids=inputs.segments,
  )
  logits = np.float64(out.logits)
  top = logits.max(-1, keepdims=True)
  return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def of_labels(table, batch):
  """Returns [B T+1]: each token's log-prob in `table`, 0 for the first."""
  labels = batch['tokens'][:, 1:, None]
  picked = np.take_along_axis(table, labels, -1)[..., 0]
  return np.pad(picked, ((0, 0), (1, 0)))


def batch(model, variables, rows, length, seed=0, spread=0.3):
  """Returns rows of packed prompts and answers, near the model's policy."""
  rng = np.random.default_rng(seed)
  made = tiny.documents(rows, length, seed, padding=2)
  segments, positions = made['segments'], made['positions']
  said = of_labels(log_probs(model, variables, made), made)
  drawn = lambda: rng.normal(size=said.shape) * spread
  # One advantage for each segment of a row.
  each = rng.normal(size=(rows, segments.max() + 1))
  return made | {
    'trained': ((positions > 0) & (segments > 0)).astype(np.float32)
    * (rng.random(said.shape) < 0.8),
    'advantages': np.take_along_axis(each, segments, 1).astype(np.float32),
    'old': np.float32(said + drawn()),
    'sampler': np.float32(said + drawn()),
    'reference': np.float32(said + drawn()),
  }
