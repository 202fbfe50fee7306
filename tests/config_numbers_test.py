"""No number of a configuration can be what no run could use.

All dataclasses of configurations are found, and every number in them is set to
NaN, infinities, -1, 0 and one that 32 bits don't hold: an InputError, or a
reason why not stands below. A new field without a check fails.
"""

import dataclasses
import importlib
import math
import pkgutil
import typing

import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax import config as configs
from deepseek_jax import plan
from deepseek_jax.cli.named import PlanConfig
from deepseek_jax.data import DataConfig
from deepseek_jax.infer.engine_config import EngineConfig
from deepseek_jax.infer.sampling import SampleConfig
from deepseek_jax.model.attention.compressor import CompressorConfig
from deepseek_jax.model.attention.csa import CSAConfig
from deepseek_jax.model.attention.dsa import DSAConfig
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.attention.hca import HCAConfig
from deepseek_jax.model.attention.indexer import (
  IndexBlocksConfig,
  IndexerConfig,
)
from deepseek_jax.model.attention.mla import MLAConfig
from deepseek_jax.model.attention.nsa import NSAConfig
from deepseek_jax.model.attention.rope import (
  LinearConfig,
  Llama3Config,
  RopeConfig,
  YarnConfig,
)
from deepseek_jax.model.attention.shared_kv import SharedKVConfig
from deepseek_jax.model.block import BlockConfig
from deepseek_jax.model.experts.balance import BalanceConfig
from deepseek_jax.model.experts.capacity import CapacityConfig
from deepseek_jax.model.experts.ffn import FFNConfig
from deepseek_jax.model.experts.moe import MoEConfig
from deepseek_jax.model.experts.router import RouterConfig
from deepseek_jax.model.hyper_connections import HyperConnectionsConfig
from deepseek_jax.model.lora import LoRAConfig
from deepseek_jax.model.memory.engram import EngramConfig
from deepseek_jax.model.mtp import MTPConfig
from deepseek_jax.model.residual import ResidualConfig
from deepseek_jax.model.transformer_config import (
  ComputeConfig,
  Kind,
  TransformerConfig,
)
from deepseek_jax.parallel.exchange import ExchangeConfig
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.plan.bubbles import Durations
from deepseek_jax.plan.compiled import Program
from deepseek_jax.plan.device_shares import Mesh
from deepseek_jax.plan.memory import Training
from deepseek_jax.rl.advantages import AdvantageConfig, LengthPenaltyConfig
from deepseek_jax.rl.answering import AnswerConfig
from deepseek_jax.rl.chats import ChatConfig
from deepseek_jax.rl.distill import DistillConfig
from deepseek_jax.rl.grpo import GRPOConfig
from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.rl.sft import SFTConfig
from deepseek_jax.run.config import EvaluateConfig, RunConfig, SafetyConfig
from deepseek_jax.serve.config import Limits, ServeConfig
from deepseek_jax.train.gate import GateConfig
from deepseek_jax.train.muon import MuonConfig
from deepseek_jax.train.objective import PretrainingConfig
from deepseek_jax.train.optimizer import OptimizerConfig
from deepseek_jax.train.schedules import (
  BatchConfig,
  ScheduleConfig,
  SwitchConfig,
)
from deepseek_jax.train.step import TrainConfig
from tests import tiny

MLA = MLAConfig(2, 8, 8, 4, 4, 4)
MOE = MoEConfig(8, 2, 4, limit=10.0)
RUN = RunConfig(
  tiny.config('v3'),
  DataConfig(vocab_size=tiny.VOCAB),
  TrainConfig(1e6, BatchConfig(8)),
)
MODEL = dataclasses.replace(tiny.config('v3'), engram=EngramConfig(7, heads=2))
# One of each class, with a number wherever there may be None.
EXAMPLES = (
  BalanceConfig(),
  BatchConfig(8),
  BlockConfig(MLA, MOE),
  CSAConfig(),
  CapacityConfig(),
  CompressorConfig(4, True, 8, 4, RopeConfig(), 1e-6),
  ComputeConfig(),
  DSAConfig(2, 8, 8, 4, 4, 4),
  DataConfig(),
  Durations(overlapped=3.0),
  EngineConfig(pages=64, draft_rows=1, snapshots=1),
  EngramConfig(7, heads=2),
  EvaluateConfig(stride=4),
  ExchangeConfig(),
  FFNConfig(8, 10.0),
  GQAConfig(4, 2, 8),
  GateConfig(),
  HCAConfig(),
  HyperConnectionsConfig(),
  IndexBlocksConfig(),
  IndexerConfig(),
  Kind(),
  Llama3Config(),
  LoRAConfig(),
  MLA,
  MOE,
  MTPConfig(1),
  Mesh(),
  MeshConfig(),
  MuonConfig(),
  NSAConfig(4, 2, 8, 8),
  OptimizerConfig(),
  Program(tiny.config('v3'), MeshConfig()),
  plan.Recipe(),
  PlanConfig(tiny.config('v3'), plan.Recipe()),
  ResidualConfig(),
  RopeConfig(),
  RouterConfig(bias=False, hash_vocab=tiny.VOCAB),
  RUN,
  SafetyConfig(),
  SampleConfig(),
  ScheduleConfig(),
  SharedKVConfig(4, 8, 4, 8, 2, 4),
  SwitchConfig(0.3, 0.1, 0.5),
  TrainConfig(1e6, BatchConfig(8)),
  Training(),
  MODEL,
  YarnConfig(attention_factor=1.0),
  LinearConfig(),
  Limits(),
  ServeConfig(),
  PretrainingConfig(),
  AdvantageConfig(),
  AnswerConfig(n=1),
  LengthPenaltyConfig(20, 4),
  ChatConfig(),
  DistillConfig(),
  RolloutConfig(),
  SFTConfig(),
  GRPOConfig(
    dual_clip=3.0,
    kl='k3',
    kl_weight=0.1,
    off_policy_bound=0.1,
    aggregation='constant',
    length=8,
  ),
)
_NONE = 'there is none of it'
_NEVER = 'it never happens'
_FREE = 'the weight of a loss that is left out'
_SIGN = 'any finite number has a meaning'
_SEED = 'seeds are 32 bits without a sign'
ALLOWED = {
  (AdvantageConfig, 'eps'): ('zero', _NONE),
  (AnswerConfig, 'seed'): ('zero', _SEED),
  (AnswerConfig, 'temperature'): ('zero', 'the likeliest token'),
  (ChatConfig, 'shown'): ('zero', _NONE),
  (DistillConfig, 'beta'): ('zero', 'the forward divergence'),
  (GRPOConfig, 'clip_low'): ('zero', 'no ratio below 1'),
  (GRPOConfig, 'clip_high'): ('zero', 'no ratio above 1'),
  (GRPOConfig, 'off_policy_bound'): ('zero', 'whatever fell is dropped'),
  (GRPOConfig, 'reference_every'): ('zero', _NEVER),
  (BalanceConfig, 'sequence'): ('zero', _FREE),
  (BalanceConfig, 'expert'): ('zero', _FREE),
  (BalanceConfig, 'device'): ('zero', _FREE),
  (BalanceConfig, 'communication'): ('zero', _FREE),
  (BatchConfig, 'start'): ('zero', _NONE),
  (BatchConfig, 'ramp_tokens'): ('zero', _NONE),
  (BlockConfig, 'engram_rows'): ('zero', _NONE),
  (CSAConfig, 'loss'): ('zero', _FREE),
  (CSAConfig, 'recall_queries'): ('zero', _NONE),
  (CapacityConfig, 'exempt'): ('zero', _NONE),
  (DSAConfig, 'loss'): ('zero', _FREE),
  (DSAConfig, 'recall_queries'): ('zero', _NONE),
  (DataConfig, 'fim_rate'): ('zero', _NONE),
  (DataConfig, 'heldout_fraction'): ('zero', _NONE),
  (DataConfig, 'seed'): ('zero huge', _SEED),
  (Durations, 'forward'): ('zero', 'times may be ignored'),
  (Durations, 'weight'): ('zero', 'times may be ignored'),
  (Durations, 'overlapped'): ('zero', 'times may be ignored'),
  (EngineConfig, 'drafts'): ('zero', _NONE),
  (EngineConfig, 'draft_rows'): ('zero', _NEVER),
  (EngineConfig, 'snapshots'): ('zero', _NONE),
  (EngramConfig, 'conv'): ('zero', _NONE),
  (EngramConfig, 'classes'): ('zero', 'as many as tokens'),
  (EngramConfig, 'seed'): ('zero', _SEED),
  (EvaluateConfig, 'every'): ('zero', _NEVER),
  (GateConfig, 'sigma'): ('zero', 'finiteness alone is judged'),
  (HyperConnectionsConfig, 'alpha'): ('minus zero', _SIGN),
  (HyperConnectionsConfig, 'diagonal'): ('minus zero', _SIGN),
  (Limits, 'seconds'): ('zero', 'no limit'),
  (MoEConfig, 'shared'): ('zero', _NONE),
  (MoEConfig, 'redundant'): ('zero', _NONE),
  (MTPConfig, 'depth'): ('zero', _NONE),
  (MuonConfig, 'momentum'): ('zero', _NONE),
  (MuonConfig, 'decay'): ('zero', _NONE),
  (MuonConfig, 'settling'): ('zero', _NONE),
  (NSAConfig, 'initial'): ('zero', _NONE),
  (NSAConfig, 'local'): ('zero', _NONE),
  (OptimizerConfig, 'beta1'): ('zero', _NONE),
  (OptimizerConfig, 'beta2'): ('zero', _NONE),
  (OptimizerConfig, 'decay'): ('zero', _NONE),
  (OptimizerConfig, 'clip'): ('infinity', 'it never clips'),
  (plan.Recipe, 'dollars'): ('zero', 'own machines'),
  (plan.Recipe, 'exposed'): ('zero', 'compute hides all of it'),
  (RolloutConfig, 'redraws'): ('zero', _NONE),
  (RolloutConfig, 'top_k'): ('zero', 'all tokens'),
  (RolloutConfig, 'drafts'): ('zero', _NONE),
  (RolloutConfig, 'compare_every'): ('zero', _NEVER),
  (RolloutConfig, 'patience'): ('zero', _NEVER),
  (RouterConfig, 'hash_vocab'): ('zero', _NONE),
  (RunConfig, 'seed'): ('zero huge', _SEED),
  (RunConfig, 'checkpoint_every'): ('zero', _NEVER),
  (SafetyConfig, 'hang_factor'): ('zero', _NEVER),
  (SafetyConfig, 'hang_seconds'): ('zero', 'hang_factor alone decides'),
  (SafetyConfig, 'last_steps'): ('zero', _NONE),
  (SampleConfig, 'temperature'): ('zero', 'the likeliest token'),
  (SampleConfig, 'top_k'): ('zero', 'all tokens'),
  (ScheduleConfig, 'warmup'): ('zero', _NONE),
  (ScheduleConfig, 'end'): ('zero', 'the rate ends at 0'),
  (ServeConfig, 'port'): ('zero', 'a free one'),
  (SwitchConfig, 'first'): ('zero', 'switched off'),
  (SwitchConfig, 'last'): ('zero', 'switched off'),
  (SwitchConfig, 'until'): ('minus zero', 'before the run'),
  (TrainConfig, 'recall_goal'): ('zero', _NEVER),
  (TransformerConfig, 'init_std'): ('zero', 'weights that are loaded'),
  (YarnConfig, 'mscale'): ('zero', 'as if absent'),
  (YarnConfig, 'mscale_all_dim'): ('zero', 'as if absent'),
}


def members(cls, name):
  hint = typing.get_type_hints(cls)[name]
  return typing.get_args(hint) or (hint,)


def odd(cls, name):
  """Label -> a value that hardly makes sense."""
  whole = float not in members(cls, name)
  return {
    'nan': math.nan,
    'infinity': math.inf,
    'minus infinity': -math.inf,
    'minus': -1 if whole else -1.0,
    'zero': 0 if whole else 0.0,
    'huge': 2**31 if whole else 1e39,
    'true': True,
    'text': '1',
    'half': 0.5 if whole else math.nan,
  }


def numeric(cls):
  return [
    f.name
    for f in dataclasses.fields(cls)
    if {int, float} & set(members(cls, f.name))
  ]


def found():
  """Every dataclass that is a configuration, or part of one."""
  for module in pkgutil.walk_packages(ds.__path__, 'deepseek_jax.'):
    if not module.name.rpartition('.')[2].startswith('_'):
      importlib.import_module(module.name)
  todo = [RunConfig, plan.Recipe, Program, Durations]
  ours = lambda c: c.__module__.startswith('deepseek_jax')
  todo += [c for c in subclasses(object) if c.__name__.endswith('Config')]
  seen = set()
  while todo:
    cls = todo.pop()
    if cls in seen or not dataclasses.is_dataclass(cls) or not ours(cls):
      continue
    seen.add(cls)
    for hint in typing.get_type_hints(cls).values():
      todo += [m for m in flat(hint) if isinstance(m, type)]
  return seen


def subclasses(cls):
  for one in type.__subclasses__(cls):
    yield one
    yield from subclasses(one) if one is not type else ()


def flat(hint):
  yield hint
  for inner in typing.get_args(hint):
    yield from flat(inner)


class NumbersTest(parameterized.TestCase):
  def test_every_configuration_has_an_example(self):
    missing = found() - {type(e) for e in EXAMPLES}
    self.assertEmpty(missing, 'add them to EXAMPLES')

  @parameterized.named_parameters((type(e).__name__, e) for e in EXAMPLES)
  def test_what_no_run_could_use_is_refused(self, example):
    cls = type(example)
    for name in numeric(cls):
      self.assertIsNotNone(getattr(example, name), name)
      labels = ALLOWED.get((cls, name), ('', ''))[0].replace(' ', '|')
      for label, value in odd(cls, name).items():
        one = f'{cls.__name__}.{name} = {value!r}'
        if label in labels.split('|'):
          dataclasses.replace(example, **{name: value})
          continue
        with self.assertRaises(ds.InputError, msg=one) as caught:
          dataclasses.replace(example, **{name: value})
        self.assertRegex(str(caught.exception), rf'{name}\b', one)
        self.assertNotIn('\n', str(caught.exception))

  def test_exceptions_are_of_fields_that_there_are(self):
    classes = {type(e) for e in EXAMPLES}
    for cls, name in ALLOWED:
      self.assertIn(cls, classes)
      self.assertIn(name, numeric(cls))

  @parameterized.parameters(
    ({'borders': (0.6, math.nan), 'kind': 'v2'}, ScheduleConfig),
    ({'borders': (-0.1,), 'kind': 'wsd'}, ScheduleConfig),
    ({'stop': (-1,)}, SampleConfig),
    ({'stop': (math.nan,)}, SampleConfig),
    ({'stop': 5}, SampleConfig),
  )
  def test_numbers_in_tuples(self, fields, cls):
    with self.assertRaises(ds.InputError):
      cls(**fields)

  @parameterized.parameters(0, -1, 1.5, math.nan, math.inf, 'x')
  def test_repeats_of_a_layout(self, repeat):
    with self.assertRaisesRegex(ds.InputError, 'layout entry'):
      dataclasses.replace(MODEL, layout=((('moe',), repeat),))

  def test_numbers_of_numpy_are_numbers(self):
    made = MoEConfig(np.int64(8), np.int32(2), 4, limit=np.float32(2))
    self.assertEqual(made.top_k, 2)

  def test_the_message_says_where_and_what(self):
    values = ds.to_dict(MODEL)
    values['attention']['rope']['scaling']['factor'] = 0.0
    message = r'^attention\.rope\.scaling: yarn\.factor = 0\.0: must be at lea'
    with self.assertRaisesRegex(ds.InputError, message):
      ds.from_dict(TransformerConfig, values)

  def test_ends_of_a_range(self):
    for ends, inside in (('[]', '01'), ('[)', '0'), ('(]', '1'), ('()', '')):
      for value in (0.0, 1.0):
        one = FFNConfig(8, 1.0)
        object.__setattr__(one, 'limit', value)
        check = lambda one=one, ends=ends: configs.within(
          one, ends=ends, limit=(0, 1)
        )
        if str(int(value)) in inside:
          check()
        else:
          with self.assertRaisesRegex(ds.InputError, 'excluded'):
            check()


if __name__ == '__main__':
  absltest.main()
