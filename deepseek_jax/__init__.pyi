# What `import deepseek_jax as ds` gives: each name, and where it comes from.
# __init__.py reads this file, and imports a name when it is first asked for.
from deepseek_jax import hf, ladder, plan, presets, recipes
from deepseek_jax.config import from_dict, to_dict
from deepseek_jax.config_changes import changed
from deepseek_jax.data.config import DataConfig
from deepseek_jax.errors import InputError, Preempted, RunAborted
from deepseek_jax.infer.engine import Engine, EngineBusy
from deepseek_jax.infer.engine_config import EngineConfig
from deepseek_jax.infer.request import Answer, Event, Request, Sampling
from deepseek_jax.infer.sampling import SampleConfig, generate, stream
from deepseek_jax.model.attention.rope import rope
from deepseek_jax.model.attention_maps import attention_layers, attention_maps
from deepseek_jax.model.cache import Cache
from deepseek_jax.model.experts.router import Router, RouterConfig, routing
from deepseek_jax.model.experts.router import choose as choose_experts
from deepseek_jax.model.lora import LoRAConfig
from deepseek_jax.model.merging import merged
from deepseek_jax.model.stacks import moe_statistics
from deepseek_jax.model.transformer import Model, Output, build
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.parallel.exchange import ExchangeConfig
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.record.comparison import differences, interval
from deepseek_jax.record.comparison import value as last_value
from deepseek_jax.record.flight import load as read_routing
from deepseek_jax.record.load_balance import max_violation
from deepseek_jax.record.metric import Metric
from deepseek_jax.record.metrics import read as read_metrics
from deepseek_jax.record.report.page import write_report
from deepseek_jax.record.shown import LiveCurves, show_picture, show_tree
from deepseek_jax.record.writers import ScalarWriter
from deepseek_jax.rl import grpo
from deepseek_jax.rl.advantages import AdvantageConfig
from deepseek_jax.rl.chats import ChatConfig
from deepseek_jax.rl.distill import DistillConfig
from deepseek_jax.rl.grpo import GRPOConfig
from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.rl.sft import SFTConfig
from deepseek_jax.run.arms import read_arms
from deepseek_jax.run.config import EvaluateConfig, RunConfig, SafetyConfig
from deepseek_jax.run.export import export_run
from deepseek_jax.run.fit import Run, fit
from deepseek_jax.run.folder import Loaded, load
from deepseek_jax.run.held_out import held_out
from deepseek_jax.run.steps import shared_programs
from deepseek_jax.run.talk import talk
from deepseek_jax.train.config import TrainConfig
from deepseek_jax.train.evaluate import bits_per_byte
from deepseek_jax.train.gate import GateConfig
from deepseek_jax.train.muon import MuonConfig
from deepseek_jax.train.objective import (
  Inputs,
  Objective,
  Predictions,
  PretrainingConfig,
  Shares,
  next_token,
)
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.schedules import (
  BatchConfig,
  ScheduleConfig,
  SwitchConfig,
)
from deepseek_jax.train.step import TrainState, initial_state, train_step

__all__ = [
  'AdvantageConfig',
  'Answer',
  'BatchConfig',
  'Cache',
  'ChatConfig',
  'DataConfig',
  'DistillConfig',
  'Engine',
  'EngineBusy',
  'EngineConfig',
  'EvaluateConfig',
  'Event',
  'ExchangeConfig',
  'GRPOConfig',
  'GateConfig',
  'InputError',
  'Inputs',
  'LiveCurves',
  'LoRAConfig',
  'Loaded',
  'MeshConfig',
  'Metric',
  'Model',
  'MuonConfig',
  'Objective',
  'OptimizerConfig',
  'Output',
  'Predictions',
  'Preempted',
  'PretrainingConfig',
  'Request',
  'RolloutConfig',
  'Router',
  'RouterConfig',
  'Run',
  'RunAborted',
  'RunConfig',
  'SFTConfig',
  'SafetyConfig',
  'SampleConfig',
  'Sampling',
  'ScalarWriter',
  'ScheduleConfig',
  'Shares',
  'SwitchConfig',
  'TrainConfig',
  'TrainState',
  'TransformerConfig',
  'attention_layers',
  'attention_maps',
  'bits_per_byte',
  'build',
  'changed',
  'choose_experts',
  'differences',
  'export_run',
  'fit',
  'from_dict',
  'generate',
  'grpo',
  'held_out',
  'hf',
  'initial_state',
  'interval',
  'ladder',
  'last_value',
  'load',
  'max_violation',
  'merged',
  'moe_statistics',
  'next_token',
  'plan',
  'presets',
  'read_arms',
  'read_metrics',
  'read_routing',
  'recipes',
  'rope',
  'routing',
  'shared_programs',
  'show_picture',
  'show_tree',
  'stream',
  'talk',
  'to_dict',
  'train_step',
  'write_report',
]

__version__: str
