"""deepseek_jax: efficient sparse transformers in JAX.

import deepseek_jax as ds

config = ds.presets.v3_tiny()                # a model
model = ds.build(config)
variables = model.init(jax.random.key(0))
out = model.apply(variables, tokens)

run = ds.fit(ds.recipes.v3_tiny(), 'runs/v3')  # a run: model, data, training
loaded = ds.load('runs/v3')
"""

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
from deepseek_jax.version import __version__
