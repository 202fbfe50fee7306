"""Kinds by flag, the field list of --help, and completion."""

import dataclasses
import shlex
import subprocess
import sys
import tempfile
import typing
from pathlib import Path
from unittest import mock

from absl import flags
from absl.testing import absltest, parameterized
from ml_collections import config_flags

import deepseek_jax as ds
from deepseek_jax import config as configs
from deepseek_jax import fields
from deepseek_jax.cli import common, completion, help, kinds
from deepseek_jax.cli import main as program
from deepseek_jax.model.attention.gqa import GQAConfig
from deepseek_jax.model.attention.rope import YarnConfig
from deepseek_jax.run.config import RunConfig
from deepseek_jax.train.muon import MuonConfig

_KINDS = ('mla', 'gqa', 'dsa', 'sharedkv', 'nsa')


def _switched(*pairs: tuple[str, str], base=ds.recipes.v3_tiny) -> RunConfig:
  config = common.editable(base())
  kinds.apply(config, pairs, common.editable, lambda line: None)
  return common.frozen(RunConfig, config)


def _given(base: RunConfig, given: list[str]) -> RunConfig:
  """Returns a configuration that flags have changed."""
  values, argv = flags.FlagValues(), ['program', *given]
  with mock.patch.object(sys, 'argv', argv):
    config_flags.DEFINE_config_dict(
      'config', common.editable(base), flag_values=values
    )
    values(argv)
  return common.frozen(RunConfig, values['config'].value)


def _all_classes(cls: type, seen: set) -> set:
  for hint in typing.get_type_hints(cls).values():
    for inner in configs.classes_of(hint):
      if inner not in seen:
        seen.add(inner)
        _all_classes(inner, seen)
  return seen


class KindsTest(parameterized.TestCase):
  @parameterized.product(kind=_KINDS, base=('v3_tiny', 'v32_tiny', 'nsa_tiny'))
  def test_every_attention_can_stand_in_for_every_other(self, kind, base):
    run = _switched(('model.attention', kind), base=getattr(ds.recipes, base))
    self.assertEqual(configs.kind_name(type(run.model.attention)), kind)
    old = getattr(ds.recipes, base)()
    self.assertEqual(run.model.attention.heads, old.model.attention.heads)
    ds.build(run.model)  # shapes fit

  def test_the_kinds_own_defaults_hold(self):
    attention = _switched(('model.attention', 'gqa')).model.attention
    old = ds.recipes.v3_tiny().model.attention
    self.assertEqual(attention, GQAConfig(4, 4, old.v_dim))
    self.assertFalse(attention.rope.interleaved)  # GQA's, not MLA's

  @parameterized.parameters('r1_zero', 'r1', 'v32', 'dapo', 'dr_grpo')
  def test_an_objective_of_a_paper_has_its_name(self, name):
    base = ds.recipes.grpo_tiny
    run = _switched(('objective', name), base=base)
    most = base().rollouts.most
    self.assertEqual(run.objective, ds.grpo.PRESETS[name](most))
    if name == 'dr_grpo':
      self.assertEqual(run.objective.length, most)
    if name == 'dapo':
      self.assertEqual(run.objective.length_penalty.most, most)

  def test_a_kind_may_follow_a_space_and_leave_out_its_name(self):
    for given in (
      ['--config.model.attention.kind', 'gqa'],
      ['--config.model.attention', 'gqa'],
      ['--config.model.attention=gqa'],
      ['--config.model.attention.kind=gqa'],
    ):
      rest, found = kinds.taken([*given, '--config.model.dim', '64', '--quiet'])
      self.assertEqual(found, {'config': [('model.attention', 'gqa')]}, given)
      self.assertEqual(rest, ['--config.model.dim=64', '--quiet'])
    whole = ["--config.model.attention={'kind': 'gqa'}", '--config.seed=1']
    self.assertEqual(kinds.taken(whole), (whole, {}))

  @parameterized.parameters(
    'deepseek_jax.cli.main completion --help',
    'deepseek_jax.cli.main help',
    'experiments.pretrain --config=v3_tiny --help',
  )
  def test_a_reader_may_leave(self, command):
    line = f'{sys.executable} -m {command} | head -1'
    done = subprocess.run(
      ['bash', '-c', line], capture_output=True, text=True, timeout=120,
      cwd=Path(__file__).parents[2],
    )  # fmt: skip
    self.assertEqual(done.stderr, '')
    self.assertLen(done.stdout.splitlines(), 1)

  def test_a_part_that_is_absent_appears_and_goes(self):
    run = _switched(('model.attention.rope.scaling', 'yarn'))
    self.assertEqual(run.model.attention.rope.scaling, YarnConfig())
    run = _switched(('train.optimizer.muon', 'muon'))
    self.assertEqual(run.train.optimizer.muon, MuonConfig())
    run = _switched(('train.optimizer.muon', 'None'), base=ds.recipes.v4_tiny)
    self.assertIsNone(run.train.optimizer.muon)

  def test_flags_that_switch_are_told_from_fields(self):
    rest, found = kinds.taken(
      [
        '--config=x.py',
        '--config.model.attention.kind=gqa',
        '--config.train.schedule.kind=wsd',
        '--config.mesh.exchange.kind=two_hop',
        '--versus.model.attention.kind=nsa',
        '--config.model.attention.kv_heads=2',
      ]
    )
    self.assertEqual(
      found,
      {
        'config': [('model.attention', 'gqa')],
        'versus': [('model.attention', 'nsa')],
      },
    )
    self.assertLen(rest, 4)

  @parameterized.parameters(
    ('model.attention', 'gqqa', 'kinds are mla, gqa, dsa, sharedkv, nsa'),
    ('model.attention', 'None', 'model.attention = None'),
    ('model.engram', 'engram', 'has no default for base; write --config'),
    ('model.attention', 'mine:Window', 'no such dataclass is imported; kinds'),
  )
  def test_a_kind_that_is_none_is_named(self, path, kind, words):
    with self.assertRaisesRegex(ds.InputError, words):
      _switched((path, kind))

  def test_a_field_of_another_kind_names_that_kind(self):
    self.assertEqual(
      kinds.having('model.attention', 'kv_heads'), ['gqa', 'nsa']
    )
    self.assertEqual(kinds.having('model.attention', 'zzz'), [])
    self.assertEqual(kinds.having('train.schedule', 'peak'), [])


class HelpTest(parameterized.TestCase):
  def test_every_field_of_every_kind_is_described(self):
    for cls in _all_classes(RunConfig, {RunConfig}):
      missing = {f.name for f in dataclasses.fields(cls)} - set(
        fields.texts(cls)
      )
      self.assertEqual(missing, set(), cls)

  @parameterized.parameters('v3_tiny', 'v4_tiny', 'engram_tiny')
  def test_every_field_is_listed_with_its_value(self, name):
    config = getattr(ds.recipes, name)()
    text = help.of_config(config)

    def check(part, path: str):
      for field in dataclasses.fields(part):
        value, name = getattr(part, field.name), f'{path}.{field.name}'
        if dataclasses.is_dataclass(value):
          check(value, name)
        elif f'--{name}=' not in text and f'--{name}.' not in text:
          self.fail(name)

    check(config, 'config')
    self.assertIn('--config.train.batch.size=8  (int)', text)
    self.assertIn('sequences per step after the ramp.', text)
    self.assertIn("('softmax' or 'sigmoid'", text)
    for line in text.splitlines():
      self.assertLess(len(line), 300)

  @parameterized.parameters('v3_tiny', 'v4_tiny', 'engram_tiny', 'grpo_tiny')
  def test_what_is_listed_may_be_given(self, name):
    config = getattr(ds.recipes, name)()
    listed = [
      shlex.split(line.rpartition('  (')[0] or line)
      for line in help.of_config(config).splitlines()
      if line.startswith('  --config.') and '…' not in line
    ]
    self.assertGreater(len(listed), 100)
    self.assertEqual({len(words) for words in listed}, {1})
    given = [word for [word] in listed]
    self.assertEqual(_given(config, given), config)

  @parameterized.parameters(
    ('data.cache_dir', '/tmp/None', '/tmp/None'),
    ('data.cache_dir', 'None', None),
    ('mesh.rules.vocab', 'None', None),
    ('mesh.rules.vocab', "('fsdp','tensor')", ('fsdp', 'tensor')),
    ('mesh.rules.batch', 'data', 'data'),
    ('evaluate.stride', 'None', None),
  )
  def test_none_is_no_text(self, field, text, value):
    made = _given(ds.recipes.v3_tiny(), [f'--config.{field}={text}'])
    for part in field.split('.'):
      made = made[part] if isinstance(made, dict) else getattr(made, part)
    self.assertEqual(made, value)

  def test_a_section_is_listed_by_itself(self):
    config = ds.recipes.v3_tiny()
    text = help.of_config(config, 'model.moe')
    heads = [l for l in text.splitlines() if l and not l.startswith(' ')]
    self.assertEqual(
      [h.partition(' ')[0] for h in heads],
      ['model.moe', 'model.moe.router', 'model.moe.balance'],
    )
    attention = help.of_config(config, 'config.model.attention')
    self.assertIn('kinds: mla, gqa, dsa, sharedkv, nsa', attention)
    one = help.of_config(config, 'train.tokens')
    self.assertIn('--config.train.tokens=640000.0  (float)', one)

  def test_a_section_that_is_none_is_named(self):
    with self.assertRaisesRegex(ds.InputError, 'did you mean model.moe'):
      help.of_config(ds.recipes.v3_tiny(), 'model.mo')

  @parameterized.parameters(
    (['--help'], ''), (['-h'], ''), (['--help=a.b'], 'a.b'), (['--x=1'], None)
  )
  def test_what_is_asked(self, argv, section):
    self.assertEqual(help.asked(argv), section)


class CompletionTest(parameterized.TestCase):
  def _complete(self, line: str) -> list[str]:
    script = completion.script('bash') + (
      '\nCOMP_LINE="$1"; COMP_POINT=${#1}; read -ra COMP_WORDS <<< "$1"\n'
      'COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))\n'
      '_deepseek_jax 2>/dev/null; printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    with tempfile.TemporaryDirectory() as folder:
      path = Path(folder) / 'script'
      path.write_text(script)
      done = subprocess.run(
        ['bash', str(path), line], capture_output=True, text=True
      )
    return done.stdout.split()

  @parameterized.parameters(
    ('deepseek-jax pret', ['pretrain']),
    ('deepseek-jax pretrain --wor', ['--workdir=']),
    ('deepseek-jax plan --config=v4_t', ['v4_tiny']),
    ('deepseek-jax plan --config=v2_l', ['v2_lite']),
    ('deepseek-jax plan --config=v3 --versus=v2_l', ['v2_lite']),
    ('deepseek-jax pretrain --config=v2_l', []),
    ('deepseek-jax pretrain --config.train.tok', ['--config.train.tokens=']),
    ('deepseek-jax pretrain --config.model.attention.kind=g', ['gqa']),
    ('deepseek-jax pretrain --config.model.moe.router.scoring=so', ['softmax']),
  )
  def test_completes(self, line, words):
    self.assertEqual(self._complete(line), words)

  def test_every_verb_has_its_flags(self):
    for verb in program.verbs():
      self.assertIn('help', completion.flags_of(verb))
    self.assertContainsSubset(
      {'config', 'workdir', 'coordinator', 'process', 'quiet'},
      completion.flags_of('pretrain'),
    )
    self.assertContainsSubset(
      {'config', 'versus', 'cluster'}, completion.flags_of('plan')
    )

  def test_an_unknown_shell_is_named(self):
    with self.assertRaisesRegex(ds.InputError, 'one of bash, zsh'):
      completion.script('fish')


if __name__ == '__main__':
  absltest.main()
