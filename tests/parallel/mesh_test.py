"""What does not fit is refused by name, before anything is compiled."""

import jax
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec

import deepseek_jax as ds
from deepseek_jax.parallel import mesh, sharding
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.plan import device_shares as planned
from tests import tiny


def held_against(name='v3', **fields):
  mesh.check(MeshConfig(**fields), tiny.model(name).abstract)


class CheckTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'fsdp': 3}, r"embed.*'embed' of 16 does not divide by mesh.fsdp = 3"),
    ({'expert': 16}, r"down.*'experts' of 8 .* mesh.expert = 16"),
    ({'tensor': 4}, r"kv_up.*'heads' of 2 .* mesh.tensor = 4"),
  )
  def test_an_axis_that_does_not_divide(self, sizes, message):
    with self.assertRaisesRegex(ds.InputError, message):
      held_against(**sizes)

  def test_what_divides_passes(self):
    held_against(data=3, fsdp=2, expert=4, tensor=2, context=5, stage=7)

  def test_two_axes_of_a_parameter_on_one_mesh_axis(self):
    rules = {**mesh.RULES, 'heads': 'fsdp'}
    with self.assertRaisesRegex(ds.InputError, "'heads' and 'embed'"):
      held_against(fsdp=2, rules=rules)

  @parameterized.parameters(
    ({'mlp': 'data'}, "mlp = 'data': mesh.data shards 'batch'"),
    ({'heads': ('tensor', 'context')}, "mesh.context shards 'seq'"),
    ({'seq': ('context', 'expert')}, "mesh.expert already shards 'batch'"),
    ({'batch': ('data', 'data')}, 'mesh.data already shards'),
    ({'experts': ('expert', 'tensor')}, 'must be one mesh axis'),
  )
  def test_rules_that_would_mix_different_tokens(self, rules, message):
    with self.assertRaisesRegex(ds.InputError, message):
      held_against('mha', rules=MeshConfig().rules | rules)

  @parameterized.parameters(
    ({'rules': {'embed': 'fdsp'}}, 'mesh.rules.embed.*did you mean fsdp'),
    ({'data': 0}, 'mesh.data = 0'),
    ({'data': 2.0}, 'mesh.data = 2.0'),
  )
  def test_an_unknown_mesh_axis_or_size(self, fields, message):
    with self.assertRaisesRegex(ds.InputError, message):
      MeshConfig(**fields)

  def test_an_unknown_logical_axis(self):
    with self.assertRaisesRegex(ds.InputError, 'embd.*did you mean embed'):
      held_against(rules={'embd': 'fsdp'})

  def test_a_mesh_that_does_not_fit_the_devices(self):
    with self.assertRaisesRegex(ds.InputError, 'makes 8 devices.*are 1'):
      mesh.make(MeshConfig(data=4, tensor=2), jax.devices()[:1])

  def test_a_batch_that_cannot_be_cut(self):
    config = MeshConfig(data=2, expert=2, context=2)
    mesh.check_batch(config, 8, 12, 2)
    with self.assertRaisesRegex(ds.InputError, '6 sequences .* multiple of 8'):
      mesh.check_batch(config, 6, 12, 2)
    with self.assertRaisesRegex(ds.InputError, 'seq_len = 13'):
      mesh.check_batch(config, 8, 13)

  def test_flags_and_files_reach_every_field(self):
    wanted = {'expert': 4, 'rules': {'heads': ''}, 'exchange': {'factor': 3.0}}
    config = ds.from_dict(MeshConfig, wanted)
    self.assertEqual(config.ways('experts'), 1)
    self.assertEqual(config.exchange.factor, 3.0)
    self.assertEqual(ds.from_dict(MeshConfig, ds.to_dict(config)), config)
    with self.assertRaisesRegex(ds.InputError, 'kind.*two_hop'):
      ds.from_dict(MeshConfig, {'exchange': {'kind': 'three_hops'}})


class FlagsTest(absltest.TestCase):
  def test_a_launcher_changes_sizes_and_rules(self):
    from deepseek_jax.cli import common

    config = common.editable(MeshConfig())
    config.expert = 4
    config.rules.heads = ''
    config.rules.batch = ('data', 'expert')
    config.exchange.kind = 'two_hop'
    made = common.frozen(MeshConfig, config)
    self.assertEqual(made.ways('batch'), 4)
    self.assertEqual(made.rules['heads'], '')
    self.assertEqual(made.exchange.kind, 'two_hop')


class LayoutTest(absltest.TestCase):
  def test_the_rules_are_those_of_the_planner(self):
    self.assertEqual(mesh.RULES, planned.RULES)
    self.assertCountEqual(mesh.AXES, planned.AXES)

  def test_moments_lie_where_their_parameters_do(self):
    from deepseek_jax.train import step as train
    from tests.scale import invariance

    model = tiny.model('v3')
    grid = jax.sharding.AbstractMesh((1, 1, 2, 2, 1, 2), mesh.AXES)
    state = jax.eval_shape(
      lambda: train.initial_state(
        model, invariance.RECIPE, model.init(jax.random.key(0))
      )
    )
    rules = MeshConfig().rules
    places = mesh.shardings(grid, rules, model.abstract, state)
    down = lambda tree: tree['segments'][1][0]['ffn']['down'].spec
    want = PartitionSpec(None, ('expert',), ('tensor',), ('fsdp',))
    self.assertEqual(down(places.params), want)
    self.assertEqual(down(places.moments[1].mu), want)
    self.assertEqual(down(places.moments[1].nu), want)
    self.assertEqual(places.step.spec, PartitionSpec())
    bias = places.buffers['segments'][1][0]['ffn']['router']['bias']
    self.assertEqual(bias.spec, PartitionSpec(None, None))

  def test_activations_are_cut_as_far_as_they_divide(self):
    grid = jax.sharding.AbstractMesh((1, 2, 2, 2, 4, 1), mesh.AXES)
    using = sharding.Using(grid, MeshConfig().rules)
    spec = lambda *shape: using.spec(('batch', 'seq', None), shape)
    batch = ('data', 'fsdp', 'expert')
    self.assertEqual(spec(8, 12, 5), PartitionSpec(batch, ('context',), None))
    self.assertEqual(spec(6, 1, 5), PartitionSpec(('data',), None, None))
    self.assertEqual(spec(3, 3, 1, 5), PartitionSpec(None, None, None, None))


if __name__ == '__main__':
  absltest.main()
