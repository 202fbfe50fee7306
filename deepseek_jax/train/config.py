"""Describes what is trained, how long, and by which rule."""

import dataclasses

import optax
from flax import nnx

from deepseek_jax.config import above, within
from deepseek_jax.model import lora
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.train import schedules
from deepseek_jax.train import trainable as frozen
from deepseek_jax.train.gate import GateConfig
from deepseek_jax.train.optimizer import OptimizerConfig, update_rule


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Describes a run, apart from its data.

  Attributes:
    tokens: length of the run.
    batch: sequences per step.
    optimizer, schedule, gate: see there.
    mtp_weight: lambda of the MTP loss.
    bias_rate: step of the router bias (gamma), frozen by its schedule.
    trainable: names; only parameters and router biases with one of them in
      their path change ('indexer': the warm-up of sparse attention). (): all,
      or of a model with `lora` its adapters alone.
    recall_goal: the run ends early, once the mean recall of its last ten
      steps is this much; 0: never.
  """

  tokens: float
  batch: schedules.BatchConfig
  optimizer: OptimizerConfig = OptimizerConfig()
  schedule: schedules.ScheduleConfig = schedules.ScheduleConfig()
  gate: GateConfig = GateConfig()
  mtp_weight: schedules.SwitchConfig = schedules.v3_mtp_weight()
  bias_rate: schedules.SwitchConfig = schedules.v3_bias_rate()
  trainable: tuple = ()
  recall_goal: float = 0.0

  def __post_init__(self) -> None:
    """Raises InputError for a length or a goal out of range."""
    above(self, tokens=0)
    within(self, recall_goal=(0, 1))


def recipe_of(cfg: TrainConfig, model: TransformerConfig) -> TrainConfig:
  """Returns the recipe with what it leaves to the model: `trainable`."""
  if model.lora is None or cfg.trainable:
    return cfg
  return dataclasses.replace(cfg, trainable=(lora.KEY,))


def judging(cfg: TrainConfig, comparable: bool) -> TrainConfig:
  """Returns the recipe by which steps are judged, see `Objective`."""
  if comparable:
    return cfg
  return dataclasses.replace(cfg, gate=dataclasses.replace(cfg.gate, sigma=0.0))


def part_of(cfg: TrainConfig, abstract: nnx.State) -> frozen.TrainedPart | None:
  """Returns the trained part of a model's parameters; None if all are trained.

  Args:
    cfg: the recipe.
    abstract: the model's abstract parameters.

  Raises:
    InputError: `cfg.trainable` names what the model has not.
  """
  if cfg.trainable:
    frozen.check(abstract, cfg.trainable)
  return part_of_stage(cfg, abstract)


def part_of_stage(
  cfg: TrainConfig, abstract: nnx.State
) -> frozen.TrainedPart | None:
  """Returns `part_of` for a stage's parameters; the part may be empty."""
  return frozen.part(abstract, cfg.trainable) if cfg.trainable else None


def optimizer_of(
  cfg: TrainConfig, abstract: nnx.State, still: tuple[str, ...] = ()
) -> optax.GradientTransformationExtraArgs:
  """Returns the update rule of a model's parameters, or of a stage's.

  Its update takes `norm`, that of the whole model's gradient.

  Args:
    cfg: the recipe.
    abstract: the parameters.
    still: names of parameters that the objective leaves alone; their moments
      stay, so that a run may go on with another objective.
  """
  # Frozen parameters get no moments.
  part = part_of_stage(cfg, abstract)
  if part is None:
    rule = update_rule(cfg.optimizer, abstract)
  else:
    rule = part.only(update_rule(cfg.optimizer, part.abstract))
  return frozen.still(rule, still) if still else rule
