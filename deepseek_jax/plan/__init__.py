"""Computes what a configuration costs, from the configuration alone."""

from deepseek_jax.plan.attention import (
  AttentionCost,
  Form,
  Term,
  attention_cost,
)
from deepseek_jax.plan.device_shares import RULES, Mesh, mesh_of
from deepseek_jax.plan.flops import (
  CONVENTIONS,
  count_flops,
  decode_flops,
  matmul_weights,
  standard_flops,
)
from deepseek_jax.plan.hardware import (
  ACCELERATORS,
  Accelerator,
  Cluster,
  Figure,
  cluster,
)
from deepseek_jax.plan.memory import (
  Training,
  cache,
  checkpoint_bytes,
  device_bytes,
)
from deepseek_jax.plan.parameters import ParameterCount, count_parameters
from deepseek_jax.plan.pictures import plan_figure
from deepseek_jax.plan.recipe import Recipe, v3_recipe
from deepseek_jax.plan.report import Report, estimate
from deepseek_jax.plan.rollout_cost import (
  R1_ZERO,
  RolloutCost,
  RoundPlan,
  rollout_cost,
)
from deepseek_jax.plan.wire.traffic import traffic
