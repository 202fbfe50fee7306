"""Plans of training runs: on the run's mesh, by its rules and its exchange."""

import json
import pathlib
import tempfile

from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax import plan
from deepseek_jax.cli import common
from deepseek_jax.cli import plan as planner
from deepseek_jax.parallel.exchange import ExchangeConfig
from deepseek_jax.parallel.mesh import MeshConfig
from experiments.configs import v3_tiny
from tests.plan.report_test import TINY, launch


def edited(**changes):
  """The tiny run; a__b=value sets its field a.b."""
  config = common.editable(v3_tiny.get_config())
  for name, value in changes.items():
    *path, last = name.split('__')
    at = config
    for part in path:
      at = at[part]
    at[last] = value
  return config


def planned(cluster: str, **changes) -> plan.Report:
  return planner.report(edited(**changes), plan.cluster(cluster))


class RunPlanTest(parameterized.TestCase):
  def test_sizes_and_micro_batches_are_the_runs(self):
    made = planned(
      'h100x8',
      mesh__expert=2,
      mesh__fsdp=2,
      mesh__stage=2,
      mesh__schedule='dualpipe',
      train__batch__size=32,
      train__batch__accumulate=4,
    )
    self.assertEqual(made.recipe.mesh, plan.Mesh(expert=2, fsdp=2, stage=2))
    self.assertEqual(made.recipe.batch, 32)
    self.assertEqual(made.recipe.training.micro_batch, 2)
    self.assertEqual(made.recipe.training.schedule, 'dualpipe')
    self.assertEqual(made.method.weights, 2)

  def test_a_run_without_a_mesh_is_spread(self):
    made = planned('h100x4')
    self.assertEqual(made.recipe.mesh, plan.Mesh(fsdp=4))

  def test_rules_decide_what_a_device_holds(self):
    cut = planned('h100x4', mesh__expert=4)
    whole = planned('h100x4', mesh__expert=4, mesh__rules__experts='')
    weights = lambda made: made.memory['none']['weights']
    self.assertGreater(weights(whole), weights(cut))
    self.assertIn('default mesh.rules', '\n'.join(whole.assumptions))
    self.assertNotIn('mesh.rules', '\n'.join(cut.assumptions))

  def test_the_exchange_decides_how_tokens_travel(self):
    def sent(cluster, **changes):
      made = planned(cluster, mesh__expert=16, train__batch__size=16, **changes)
      return made, {
        (w.purpose, w.link): w.bytes
        for w in made.traffic.wires
        if w.purpose.startswith('expert')
      }

    far, small = ('expert dispatch', 'slow'), ('expert dispatch', 'fast')
    made, flat = sent('h100x16')
    self.assertFalse(made.recipe.node_limited)
    self.assertEqual(made.recipe.training.dispatch, 'float32')
    self.assertIn("the run's in float32", '\n'.join(made.assumptions))
    made, hops = sent(
      'h100x16', mesh__exchange__kind='two_hop', mesh__exchange__nodes=2
    )
    self.assertTrue(made.recipe.node_limited)
    self.assertLess(hops[far], flat[far])
    made, bytes_ = sent('h100x16', mesh__exchange__dispatch='bfloat16')
    self.assertEqual(2 * bytes_[small], flat[small])

  @parameterized.parameters(
    ({'mesh__exchange__kind': 'all_gather'}, 'sends all to every device'),
    (
      {'mesh__exchange__kind': 'two_hop', 'mesh__exchange__nodes': 2},
      'spans 1 nodes',
    ),
  )
  def test_what_the_plan_takes_otherwise_is_told(self, changes, words):
    made = planned('h100x4', mesh__expert=4, **changes)
    self.assertIn(words, '\n'.join(made.assumptions))

  @parameterized.parameters(
    ({'expert': 2}, 'expert=2 makes 2 devices, but the cluster has 4'),
    ({'expert': 4, 'rules__batch': ('data',)}, 'mesh.rules.batch = '),
    ({'context': 4, 'rules__seq': ''}, "mesh.rules.seq = ''"),
    ({'tensor': 4, 'rules__embed': 'tensor'}, 'both its axes'),
    ({'stage': 4}, 'train.batch.accumulate = 1'),
    (
      {'expert': 4, 'exchange__kind': 'two_hop', 'exchange__nodes': 3},
      'mesh.exchange.nodes = 3',
    ),
  )
  def test_what_does_not_fit_is_named(self, changes, message):
    changes = {f'mesh__{name}': value for name, value in changes.items()}
    with self.assertRaisesRegex(ds.InputError, message):
      planned('h100x4', **changes)

  def test_odd_micro_batches_are_refused_for_dualpipe(self):
    with self.assertRaisesRegex(ds.InputError, 'accumulate = 5: dualpipe'):
      planned(
        'h100x2',
        mesh__stage=2,
        mesh__schedule='dualpipe',
        train__batch__size=10,
        train__batch__accumulate=5,
      )

  def test_compiled_by_the_runs_rules_and_exchange_on_the_sizes_named(self):
    config = edited(
      mesh__expert=4,
      mesh__exchange__kind='all_gather',
      mesh__rules__vocab='',
    )
    made = planner.report(config, plan.cluster('h100x4'))
    grid = planner.program(made, 'expert=2,tensor=2', config).mesh
    rules = MeshConfig().rules | {'vocab': ''}
    exchange = ExchangeConfig(kind='all_gather')
    want = MeshConfig(expert=2, tensor=2, rules=rules, exchange=exchange)
    self.assertEqual(grid, want)

  def test_on_the_command_line(self):
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder) / 'plan.json'
      flags = f'--config={TINY}', '--config.mesh.expert=4', f'--json={path}'
      done = launch(*flags, '--cluster=h100x4')
      self.assertEqual(done.returncode, 0, done.stderr)
      made = json.loads(path.read_text())['v3_tiny']
    self.assertEqual(made['recipe']['mesh']['expert'], 4)
    self.assertEqual(made['recipe']['mesh']['fsdp'], 1)
    purposes = {purpose for purpose, *_ in made['traffic']['wires']}
    self.assertContainsSubset({'expert dispatch', 'expert combine'}, purposes)
    done = launch(*flags[:2])
    self.assertEqual(done.returncode, 2)
    self.assertIn('give --cluster=h100x4', done.stderr)


if __name__ == '__main__':
  absltest.main()
