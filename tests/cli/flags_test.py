"""Every field of a configuration can be set by a flag, None and back."""

from absl import flags
from absl.testing import absltest, parameterized
from ml_collections import config_flags

from deepseek_jax import config as configs
from deepseek_jax.cli import common
from deepseek_jax.model.attention.rope import YarnConfig
from deepseek_jax.model.experts.capacity import CapacityConfig
from deepseek_jax.run import fit as loop
from deepseek_jax.train.muon import MuonConfig
from experiments.configs import engram_tiny, v3_tiny, v4_tiny


def _run(*given: str, base=v3_tiny) -> loop.RunConfig:
  """The run that a config file and --config.field=value make."""
  argv = ['test', *(f'--config.{flag}' for flag in given)]
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_dict(
    'config',
    common.editable(base.get_config()),
    flag_values=values,
    sys_argv=argv,
  )
  values(argv)
  return common.frozen(loop.RunConfig, holder.value)


# flag -> the value that the run then has
_VALUES = {
  'model.attention.q_rank=None': None,
  'model.attention.q_rank=17': 17,
  'model.attention.rope.scaling={"kind": "yarn", "factor": 3}': YarnConfig(3.0),
  'model.moe.capacity={"factor": 1.5}': CapacityConfig(1.5),
  'model.moe.capacity={}': CapacityConfig(),
  'model.moe.limit=7.5': 7.5,
  'model.moe.limit=7': 7.0,
  'model.compute.kernels=reference': 'reference',
  'evaluate.stride=9': 9,
  'data.cache_dir=17': '17',
  'init_from=runs/other': 'runs/other',
}


class FlagsTest(parameterized.TestCase):
  @parameterized.parameters(*_VALUES)
  def test_sets_a_field_that_may_be_none(self, flag):
    value = _run(flag)
    for name in flag.partition('=')[0].split('.'):
      value = getattr(value, name)
    self.assertEqual(value, _VALUES[flag])
    self.assertIs(type(value), type(_VALUES[flag]))

  def test_a_part_of_a_config_that_may_be_none(self):
    flag = 'train.optimizer.muon.momentum=0.5'
    muon = _run(flag, base=v4_tiny).train.optimizer.muon
    self.assertEqual(muon, MuonConfig(0.5))
    flag = 'train.optimizer.muon=None'
    self.assertIsNone(_run(flag, base=v4_tiny).train.optimizer.muon)

  @parameterized.parameters(v3_tiny, v4_tiny, engram_tiny)
  def test_without_flags_nothing_changes(self, base):
    run = _run(base=base)
    again = common.frozen(loop.RunConfig, common.editable(run))
    self.assertEqual(again, run)
    self.assertEqual(configs.to_dict(again), configs.to_dict(run))

  def test_a_file_assigns_them(self):
    config = common.editable(_run())
    config.model.moe.capacity = CapacityConfig(1.25)
    config.model.attention.rope.scaling = {'kind': 'yarn', 'factor': 4.0}
    config.model.attention.q_rank = None
    config.evaluate.stride = 5
    run = common.frozen(loop.RunConfig, config)
    self.assertEqual(run.model.moe.capacity, CapacityConfig(1.25))
    self.assertEqual(run.model.attention.rope.scaling, YarnConfig(4.0))
    self.assertIsNone(run.model.attention.q_rank)
    self.assertEqual(run.evaluate.stride, 5)

  def test_other_fields_stay_typed(self):
    config = common.editable(_run())
    with self.assertRaises(TypeError):
      config.model.dim = 'wide'
    with self.assertRaises(AttributeError):
      config.model.width = 3


if __name__ == '__main__':
  absltest.main()
