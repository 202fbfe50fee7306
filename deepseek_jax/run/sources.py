"""Opens the data of a run: text, or conversations where it has a chat."""

from collections.abc import Callable
from typing import Any

import numpy as np

from deepseek_jax import data as datalib
from deepseek_jax.data import corpus
from deepseek_jax.rl import conversation_store
from deepseek_jax.rl.conversation_store import ConversationStore
from deepseek_jax.rl.distill import DistillConfig
from deepseek_jax.run import rl, teachers
from deepseek_jax.run.config import RunConfig
from deepseek_jax.train.objective import PretrainingConfig

Store = datalib.TokenStore | ConversationStore | rl.TaskStore


def opened(config: RunConfig, say: Callable[[str], None]) -> Store:
  """Returns the data of a run; InputError if they are wrong."""
  if config.rollouts is not None:
    return rl.opened(config)
  if config.chat is None:
    return datalib.build(config.data, say=say)
  return conversation_store.build(config.data, config.chat, say=say)


def batches(store: Store, config: RunConfig) -> datalib.Batches:
  """Returns the stream of batches that a run trains on."""
  if isinstance(config.objective, DistillConfig):
    taught = config.rollouts is None
    kind = teachers.TaughtBatches if taught else teachers.StudentBatches
    return kind(store, config)
  if config.rollouts is not None:
    return rl.RolloutBatches(store, config)
  made = (
    datalib.Batches if config.chat is None else conversation_store.PackedBatches
  )
  return made(store, config.data)


def batch_like(config: RunConfig) -> dict[str, np.ndarray] | None:
  """Returns arrays like those of a new run's first batch, before it is read.

  None: only the data tell, or there are none.
  """
  text = config.chat is None and config.rollouts is None
  known = text and isinstance(config.objective, PretrainingConfig)
  there = all(map(corpus.exists, config.data.paths))
  if not known or not there or config.model.engram_layers():
    return None
  return datalib.blank(config.data, config.train.batch.at(0))


def heldout(store: Store, config: RunConfig, limit: int | None) -> Any:
  """Returns the held-out batches that validation reads.

  Args:
    store: of the run.
    config: of the run.
    limit: documents or conversations, at most; None: all.
  """
  cfg = config.evaluate
  if config.chat is not None:
    return store.heldout_batches(cfg.batch, limit)
  return datalib.Heldout(
    store, config.data.seq_len, cfg.batch, stride=cfg.stride, limit=limit
  )
