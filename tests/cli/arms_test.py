"""Arms of a sweep, and models matched with each other; nothing is trained."""

from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.cli import arms, common
from deepseek_jax.plan import match as matching


def _runs(*axes: str, seeds=1, match=None, knob='width', base=None):
  base = common.editable(base or ds.recipes.v3_tiny())
  return arms.runs(base, [arms.axis(a) for a in axes], seeds, match, knob)


class AxisTest(parameterized.TestCase):
  @parameterized.parameters(
    ('a.b=x,y', ('a.b', ['x', 'y'])),
    ('config.a=1,2e-3', ('a', [1, 2e-3])),
    ('a=(1,2),(3,)', ('a', [(1, 2), (3,)])),
    ("a={'k':1,'l':2},None", ('a', [{'k': 1, 'l': 2}, None])),
  )
  def test_reads_a_field_and_its_values(self, text, want):
    self.assertEqual(arms.axis(text), want)

  @parameterized.parameters(
    'a', '=1', 'a=', 'a=1,,2', 'a=1,1', 'a=(1', 'seed=1,2'
  )
  def test_what_is_no_axis_is_named(self, text):
    with self.assertRaisesRegex(ds.InputError, '--axis='):
      arms.axis(text)


class RunsTest(parameterized.TestCase):
  def test_every_combination_has_every_seed(self):
    made = _runs(
      'model.moe.router.scoring=sigmoid,softmax', 'model.moe.top_k=2,3', seeds=2
    )
    self.assertLen(made, 8)
    self.assertLen({run.name for run in made}, 8)
    self.assertEqual(made[0].name, 'router.scoring=sigmoid-moe.top_k=2-seed=0')
    last = made[-1].config
    self.assertEqual(last.model.moe.router.scoring, 'softmax')
    self.assertEqual(last.model.moe.top_k, 3)
    self.assertEqual((last.seed, last.data.seed), (1, 1))

  def test_an_axis_may_switch_the_kind_and_then_a_field(self):
    made = _runs('model.attention.kind=gqa', 'model.attention.kv_heads=1,2')
    kv = [run.config.model.attention.kv_heads for run in made]
    self.assertEqual(kv, [1, 2])

  def test_numbers_and_parts_are_read(self):
    made = _runs('train.schedule.peak=1,2e-3', 'model.moe.capacity=None,{}')
    self.assertEqual(made[0].config.train.schedule.peak, 1.0)
    self.assertIsNone(made[0].config.model.moe.capacity)
    self.assertIsNotNone(made[1].config.model.moe.capacity)

  @parameterized.parameters(
    ('model.moe.router.scorin=softmax', 'did you mean .*scoring'),
    ('model.moe.router.scoring=softmax,relu', "scoring = 'relu'"),
    ('model.attention.kind=gqq', 'kinds are mla, gqa'),
    ('model.moe.top_k=2,40', 'top_k = 40'),
  )
  def test_a_wrong_arm_is_named_before_any_runs(self, axis, words):
    with self.assertRaisesRegex(ds.InputError, f'arm model.*{words}'):
      _runs(axis)

  @parameterized.parameters('active_params', 'params', 'flops')
  def test_arms_are_matched(self, name):
    axes = ('model.attention.kind=gqa', 'model.attention.kv_heads=4,1')
    made = _runs(*axes, match=name)
    cost = matching.quantity(name, ds.recipes.v3_tiny().data.seq_len)
    first, second = (cost(run.config.model) for run in made)
    self.assertLess(abs(second / first - 1), matching.CLOSE)
    plain = _runs(*axes)
    self.assertEqual(made[0].config, plain[0].config)
    unmatched = cost(plain[1].config.model)
    self.assertLess(abs(second - first), abs(unmatched - first) / 2)
    self.assertIn('width = ', made[1].note)
    self.assertIn(name, made[1].note)

  def test_what_is_too_large_to_match_is_named(self):
    with self.assertRaisesRegex(
      ds.InputError, r'kind=dsa.* the closest is .*--match_by=depth'
    ):
      _runs('model.attention.kind=mla,dsa', match='flops')


class MatchTest(parameterized.TestCase):
  def test_depth_is_matched_by_whole_layers(self):
    deep = ds.changed(
      ds.presets.v3_tiny(), {'layout': ((('dense',), 1), (('moe',), 12))}
    )
    shallow = ds.changed(deep, {'layout': ((('dense',), 1), (('moe',), 3))})
    found = matching.match(shallow, deep, 'params', seq_len=256, knob='depth')
    self.assertEqual(found.changes, {'layout': deep.layout})
    self.assertEqual(found.cost, found.goal)

  def test_active_parameters_are_those_of_a_token(self):
    config = ds.presets.v3_tiny()
    count = ds.plan.count_parameters(config)
    for name, number in (
      ('active_params', count.active),
      ('params', count.total),
    ):
      self.assertEqual(matching.quantity(name, 64)(config), number)
    self.assertLess(count.active, count.total)

  def test_what_is_equal_stays(self):
    config = ds.presets.v3_tiny()
    found = matching.match(config, config, 'flops', seq_len=64)
    self.assertEqual(found.config, config)
    self.assertEqual(found.changes, {})
    self.assertIn('nothing changed', matching.told(found, 'flops'))

  @parameterized.parameters(
    ({'name': 'width'}, 'match = '),
    ({'knob': 'height'}, 'match_by = '),
    ({'knob': 'depth'}, 'the closest is .* try --match_by=width'),
  )
  def test_what_cannot_be_matched_is_named(self, changes, words):
    config = ds.presets.v3_tiny()
    wider = ds.changed(config, {'ffn.width': 8 * config.ffn.width})
    given = {'name': 'active_params', 'knob': 'width'} | changes
    with self.assertRaisesRegex(ds.InputError, words):
      matching.match(
        config, wider, given['name'], seq_len=64, knob=given['knob']
      )


if __name__ == '__main__':
  absltest.main()
