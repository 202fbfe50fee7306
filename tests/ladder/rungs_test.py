"""The rungs: each differs from the one below in what it says, and no more."""

import itertools
import pathlib

from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.cli import experiment_file
from deepseek_jax.ladder import costs, rungs
from deepseek_jax.ladder.sizes import SIZES

FOLDER = pathlib.Path(__file__).resolve().parents[2] / 'experiments' / 'ladder'


def flat(tree, path=''):
  """Returns the leaves of a configuration by dotted path."""
  if not isinstance(tree, dict):
    return {path: tree}
  out = {}
  for name, value in tree.items():
    out |= flat(value, f'{path}.{name}'.lstrip('.'))
  return out


def differing(one, other):
  """Returns the dotted fields in which two runs differ."""
  one, other = flat(ds.to_dict(one)), flat(ds.to_dict(other))
  return {
    name
    for name in {*one, *other}
    if name not in one or name not in other or one[name] != other[name]
  }


def covered(field, fields):
  return any(field == name or field.startswith(f'{name}.') for name in fields)


class RungsTest(parameterized.TestCase):
  @parameterized.parameters(*SIZES)
  def test_neighbours_differ_in_the_named_change_alone(self, size):
    arms = rungs.climbed(SIZES[size])
    for below, rung in itertools.pairwise(rungs.RUNGS):
      found = differing(arms[below.name], arms[rung.name])
      with self.subTest(rung.name):
        other = {f for f in found if not covered(f, rung.fields)}
        self.assertEqual(other, set())
        for name in rung.fields:
          self.assertTrue(any(covered(f, (name,)) for f in found), name)

  def test_a_second_change_is_noticed(self):
    run = rungs.climbed(SIZES['smoke'])['mla']
    other = ds.changed(run, {'model.moe.top_k': 2, 'train.optimizer.clip': 2.0})
    found = differing(run, other)
    self.assertEqual(found, {'model.moe.top_k', 'train.optimizer.clip'})
    self.assertFalse(covered('model.moe.top_k', ('model.moe.top',)))

  @parameterized.parameters(*SIZES)
  def test_experts_of_a_token_are_as_wide_as_the_dense_ffn(self, size):
    arms = rungs.climbed(SIZES[size])
    width = SIZES[size].shape.ffn
    for name in ('coarse', 'fine', 'shared'):
      moe = arms[name].model.moe
      self.assertEqual((moe.top_k + moe.shared) * moe.width, width, name)
      stored = (moe.experts + moe.shared) * moe.width
      self.assertEqual(stored, SIZES[size].shape.experts * width // (
        SIZES[size].shape.top_k), name)  # fmt: skip

  def test_the_files_are_the_rungs_in_their_order(self):
    paths = sorted(FOLDER.glob('*.py'))
    names = [path.stem.partition('_')[2] for path in paths]
    self.assertEqual(names, list(rungs.names()))
    for path, name in zip(paths, names):
      module = experiment_file.load(str(path))
      for size in ('half_hour', 'smoke'):
        self.assertEqual(module.get_config(size), ds.ladder.config(name, size))
      self.assertIn(f'experiments/ladder/{path.name}', module.__doc__)

  def test_what_is_no_rung_or_size_is_named(self):
    with self.assertRaisesRegex(ds.InputError, "rung = 'mlp': must be one of"):
      ds.ladder.config('mlp')
    with self.assertRaisesRegex(ds.InputError, "size = 'huge': must be one of"):
      ds.ladder.config('mla', 'huge')

  def test_muons_own_arithmetic_is_counted_by_hand(self):
    run = rungs.climbed(SIZES['half_hour'])['gqa']
    self.assertEqual(costs.update_flops(run), 0)
    run = ds.changed(run, {'train.optimizer.muon': ds.MuonConfig()})
    one = lambda n, m: 10 * (2 * n * n * m + 2 * n**3 + 2 * n * n * m)
    # Queries and output; keys and values; gate, up and down.
    layer = 2 * one(128, 128) + 2 * one(64, 128) + 3 * one(128, 384)
    self.assertEqual(costs.update_flops(run), 3 * layer)

  def test_published_widths_have_the_published_cache(self):
    context = 1000
    cache = lambda name: (
      costs.cache(rungs.shaped(ds.ladder.published(), name), context).elements
    )
    layers = 61 * context
    self.assertEqual(cache('mha'), layers * 2 * 128 * 128)
    self.assertEqual(cache('gqa'), layers * 2 * 8 * 128)
    self.assertEqual(cache('mla'), layers * (512 + 64))  # V3: 576 a layer
    self.assertEqual(cache('mtp'), cache('mla'))
    self.assertEqual(cache('dsa'), layers * (512 + 64 + 128))  # and index keys


if __name__ == '__main__':
  absltest.main()
