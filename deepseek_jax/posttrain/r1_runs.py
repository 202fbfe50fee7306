"""Makes the run of every trained stage of a small R1 from its recipe."""

import dataclasses
from pathlib import Path
from typing import Any

from deepseek_jax.data.config import DataConfig
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.posttrain.r1_recipe import R1Recipe
from deepseek_jax.rl.chats import ChatConfig
from deepseek_jax.rl.grpo import GRPOConfig
from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.rl.sft import SFTConfig
from deepseek_jax.run.config import EvaluateConfig, RunConfig
from deepseek_jax.train.config import TrainConfig
from deepseek_jax.train.schedules import (
  BatchConfig,
  ScheduleConfig,
  SwitchConfig,
)

HELD_OUT = 0.03  # of text and conversations
_SAVES = 4  # checkpoints of a stage, beside the last


@dataclasses.dataclass(frozen=True)
class R1Runs:
  """Makes the runs of a recipe in a folder."""

  recipe: R1Recipe
  folder: Path

  def _data(self, path: Path, **changes: Any) -> DataConfig:
    """Returns the data at a path, in bytes."""
    return DataConfig(
      path=str(path),
      tokenizer='bytes',
      vocab_size=self.recipe.model.vocab_size,
      seq_len=self.recipe.seq_len,
      fim_rate=0.0,
      heldout_fraction=HELD_OUT,
      seed=self.recipe.seed,
      cache_dir=str(self.folder / 'cache'),
      **changes,
    )

  def _train(
    self, tokens: float, batch: int, schedule: ScheduleConfig, **changes: Any
  ) -> TrainConfig:
    """Returns so many tokens of training, in batches of so many rows."""
    return TrainConfig(
      tokens=tokens,
      batch=BatchConfig(size=batch),
      schedule=schedule,
      mtp_weight=SwitchConfig(0.1, 0.1, 0.5),
      **changes,
    )

  def _saves(self, tokens: float, batch: int) -> int:
    """Returns the steps between checkpoints."""
    steps = tokens / (batch * self.recipe.seq_len)
    return max(1, round(steps / (_SAVES + 1)))

  def pretraining(self, model: TransformerConfig, path: Path) -> RunConfig:
    """Returns pretraining on the synthetic text."""
    recipe = self.recipe
    return RunConfig(
      model,
      self._data(path),
      self._train(
        recipe.pretrain,
        recipe.batch,
        ScheduleConfig('cosine', peak=recipe.pretrain_rate, warmup=20),
      ),
      seed=recipe.seed,
      checkpoint_every=self._saves(recipe.pretrain, recipe.batch),
      keep=1,
    )

  def supervised(
    self, model: TransformerConfig, path: Path, tokens: float, start: Path
  ) -> RunConfig:
    """Returns fine-tuning on the conversations of a file.

    Args:
      model: of the run that it begins with.
      path: of the conversations.
      tokens: that are read.
      start: folder of that run.
    """
    recipe = self.recipe
    return RunConfig(
      model,
      self._data(path),
      self._train(
        tokens,
        recipe.batch,
        ScheduleConfig('cosine', peak=recipe.cold_rate, warmup=10),
        bias_rate=SwitchConfig(0.0, 0.0, 0.5),
      ),
      objective=SFTConfig(),
      chat=ChatConfig('plain'),
      seed=recipe.seed,
      checkpoint_every=self._saves(tokens, recipe.batch),
      keep=1,
      init_from=str(start),
    )

  def reinforcement(
    self, path: Path, rounds: int, start: Path, **rollouts: Any
  ) -> RunConfig:
    """Returns reinforcement on a task, with R1's objective.

    Args:
      path: of the task.
      rounds: of rollouts.
      start: folder of the run that it begins with.
      **rollouts: other fields of the RolloutConfig.
    """
    recipe = self.recipe
    rows = recipe.prompts * recipe.group
    tokens = float(rows * recipe.seq_len * rounds)
    return RunConfig(
      recipe.model,
      self._data(path),
      self._train(
        tokens,
        rows,
        ScheduleConfig('constant', peak=recipe.rl_rate, warmup=5),
        bias_rate=SwitchConfig(0.0, 0.0, 0.5),
      ),
      objective=GRPOConfig(
        clip_low=10.0, clip_high=10.0, kl='k3', kl_weight=0.001
      ),
      rollouts=RolloutConfig(
        prompts=recipe.prompts,
        group=recipe.group,
        most=recipe.most,
        slots=recipe.slots,
        **rollouts,
      ),
      chat=ChatConfig('plain'),
      evaluate=EvaluateConfig(
        every=recipe.validate, documents=2 * recipe.measured
      ),
      seed=recipe.seed,
      checkpoint_every=max(1, rounds // (_SAVES + 1)),
      keep=1,
      init_from=str(start),
    )
