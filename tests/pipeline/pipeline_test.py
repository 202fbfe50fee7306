"""An executed pipeline equals the model in one piece."""

import dataclasses

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.pipeline import chunk_orders as schedules
from deepseek_jax.pipeline import pipeline, stages
from tests import fake_devices, tiny

CASES = (
  '1f1b_2',
  'dualpipe_2',
  'dualpipe_4',
  '1f1b_4',
  'cut_pattern',
  'one_stage',
  'sharded',
)


class PiecesTest(parameterized.TestCase):
  @parameterized.parameters(
    (0, 7, [(0, 0, 1, 0, 3), (1, 0, 4, 0, 1)]),
    (1, 4, [(0, 0, 1, 1, 3), (1, 0, 1, 0, 1)]),
    (4, 6, [(1, 1, 3, 0, 1)]),
    (3, 11, [(1, 0, 4, 0, 2)]),
    (4, 14, [(1, 1, 4, 0, 1), (1, 0, 4, 1, 2), (1, 0, 3, 2, 3)]),
    (5, 9, [(1, 2, 4, 0, 1), (1, 0, 2, 1, 2)]),
  )
  def test_whole_patterns_stay_whole(self, first, end, want):
    pattern = ('moe', 'dense', 'moe', 'moe')
    ends = lambda s: (s.start, s.stop)
    config = dataclasses.replace(
      tiny.config('v3'), layout=((('dense',), 3), (pattern, 3))
    )
    got = [
      (p.segment, *ends(p.pattern), *ends(p.repeats))
      for p in stages.pieces(config, first, end)
    ]
    self.assertEqual(got, want)

  def test_any_cut_holds_every_layer_once(self):
    config = tiny.config('mixed')
    names = [n for names, r in config.layout for n in names * r]
    for first in range(len(names)):
      for end in range(first + 1, len(names) + 1):
        got = []
        for p in stages.pieces(config, first, end):
          repeats = p.repeats.stop - p.repeats.start
          got += config.layout[p.segment][0][p.pattern] * repeats
        self.assertEqual(got, names[first:end])


class CutTest(parameterized.TestCase):
  def test_stages_hold_what_the_planner_says(self):
    config = tiny.config('v3')
    first, *_, last = stages.cut(config, 4)
    held = {
      k: set(s.functional.abstract['params'])
      for k, s in (('first', first), ('last', last))
    }
    self.assertEqual(held['first'], {'embed', 'segments'})
    self.assertEqual(held['last'], {'embed', 'head', 'mtp', 'norm'})

  def test_stages_make_up_the_model(self):
    for name in ('v3', 'mixed', 'llama'):
      variables = tiny.variables(name)
      cut = stages.cut(tiny.config(name), 2)
      for kind, tree in variables.items():
        parts = [s.take(tree) for s in cut]
        joined = stages.join(cut, parts)
        jax.tree.map(np.testing.assert_array_equal, joined, tree)
        for stage, part in zip(cut, parts):
          want = jax.tree.leaves(stage.abstract[kind])
          got = [a.shape for a in jax.tree.leaves(part)]
          self.assertEqual(got, [a.shape for a in want])

  def test_prediction_blocks_stay_with_the_head(self):
    config = dataclasses.replace(
      tiny.config('dense_mtp'), layout=((('dense',), 2),)
    )
    with self.assertRaisesRegex(ds.InputError, 'mesh.stage = 4.*fewer'):
      stages.cut(config, 4)

  def test_mesh_schedule_and_batch_must_fit(self):
    config = tiny.config('step')
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ('stage',))
    one = schedules.one_f_one_b(1, 4)
    with self.assertRaisesRegex(ds.InputError, "needs 'stage'"):
      data = jax.sharding.Mesh(mesh.devices, ('data',))
      pipeline.Pipeline(config, data, one)
    with self.assertRaisesRegex(ds.InputError, 'schedule has 2 ranks'):
      pipeline.Pipeline(config, mesh, schedules.one_f_one_b(2, 4))
    made = pipeline.Pipeline(config, mesh, one)
    with self.assertRaisesRegex(ds.InputError, 'batch of 6 .* 4 micro'):
      made.gradients({}, tiny.documents(6, 9))


@pytest.mark.slow  # tests/run/staged_test.py has a quick one
class ExecutedTest(parameterized.TestCase):
  def test_gradients_and_statistics_equal_one_program(self):
    for name, found in fake_devices.run(
      'tests.pipeline.pipeline_worker', *CASES
    ).items():
      with self.subTest(name):
        self.assertTrue(found['keys'])
        self.assertTrue(found['counts_equal'])
        self.assertLess(found['gradient'], 1e-5)
        self.assertLess(found['scalars'], 1e-5)
        self.assertEqual(found['round_trip'], 0)
        ranks = {p[0]: d for p, d in zip(found['places'], found['devices'])}
        of_all = [d for devices in ranks.values() for d in devices]
        self.assertLen(set(of_all), len(of_all))
        both = 2 if name.startswith('dualpipe') else 1
        self.assertLen(found['places'], both * len(ranks))


if __name__ == '__main__':
  absltest.main()
