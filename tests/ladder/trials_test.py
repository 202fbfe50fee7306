"""Budgets, rates and what is concluded; nothing is trained."""

import dataclasses
import json
import pathlib
import tempfile

from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.ladder import costs, figure, measured, rungs, table, trials
from deepseek_jax.ladder.sizes import SIZES


class TrialsTest(parameterized.TestCase):
  @parameterized.parameters('half_hour', 'large')
  def test_every_rung_spends_its_budgets_within_one_percent(self, size):
    size = SIZES[size]
    for name, run in rungs.climbed(size).items():
      made = trials.spent(run, size.budgets)
      length = run.data.seq_len
      each = ds.plan.count_flops(run.model, length, mtp=True).per_token
      step = each * run.train.batch.size * length
      for budget, at in zip(size.budgets, made.evaluate.at, strict=True):
        self.assertLess(abs(at * step / budget - 1), 0.01, name)
      self.assertEqual(
        made.train.tokens, made.evaluate.at[-1] * run.train.batch.size * length
      )
      self.assertEqual(made.steps, made.evaluate.at[-1])

  def test_prediction_of_more_tokens_is_paid_for(self):
    arms = rungs.climbed(SIZES['half_hour'])
    ratio = trials.step_flops(arms['mtp']) / trials.step_flops(arms['bias'])
    self.assertGreater(ratio, 1.2)
    more = [trials.steps_of(arms[n], (3e11,))[0] for n in ('bias', 'mtp')]
    self.assertGreater(more[0], 1.2 * more[1])

  def test_the_best_rate_goes_on_and_seeds_stop_early(self):
    size = SIZES['half_hour']
    arms = {'mla': rungs.climbed(size)['mla']}
    tried = trials.rate_trials(arms, size)
    self.assertLen(tried, len(size.rates))
    rates = {'mla': size.rates[1]}
    long, seed = trials.further_trials(arms, size, rates)
    steps = long.config.evaluate.at
    # One run, of which the trial is the beginning.
    self.assertEqual((tried[1].name, tried[1].config), (long.name, long.config))
    self.assertEqual((tried[1].until, long.until), (steps[0], steps[-1]))
    self.assertEqual(seed.until, steps[0])
    same = ds.changed(seed.config, {'seed': 0, 'data.seed': 0})
    self.assertEqual(same, long.config)
    self.assertEqual((seed.config.seed, seed.config.data.seed), (1, 1))
    middle = trials.further_trials(arms, size, rates, 2)[0]
    self.assertEqual(middle.until, steps[1])
    # Nothing follows the run's length.
    self.assertEqual(long.config.train.schedule.kind, 'constant')
    for switch in ('mtp_weight', 'bias_rate'):
      value = getattr(long.config.train, switch)
      self.assertEqual(value.first, value.last)
    count, flops = trials.planned(arms, size, ['mla'])
    self.assertEqual(count, len(size.rates) + size.seeds - 1)
    # Two rates, a seed, and all budgets of the best.
    self.assertAlmostEqual(
      flops, 3 * seed.flops + long.flops, delta=1e-6 * flops
    )

  @parameterized.parameters((1e9, 9e11), (3e11, 3.001e11))
  def test_budgets_that_are_no_budgets_are_named(self, *budgets):
    run = rungs.climbed(SIZES['half_hour'])['gqa']
    with self.assertRaisesRegex(ds.InputError, 'budgets = .* make .* steps of'):
      trials.steps_of(run, budgets)

  @parameterized.parameters(
    ({'budgets': (1e12,)}, 'two at least'),
    ({'budgets': (1e12, 1e12)}, 'rising order'),
    ({'budgets': (-1.0, 1e12)}, 'above 0'),
    ({'rates': ()}, 'size.rates'),
    ({'seeds': 0}, 'size.seeds = 0'),
    ({'heldout': 1.0}, 'size.heldout'),
    ({'speed': 0.0}, 'size.speed'),
  )
  def test_a_size_that_cannot_be_run_is_named(self, changes, words):
    with self.assertRaisesRegex(ds.InputError, words):
      dataclasses.replace(SIZES['smoke'], **changes)

  @parameterized.parameters(
    ({'coarser': 3}, 'shape.coarser = 3: must divide top_k = 4'),
    ({'ffn': 386}, 'shape.ffn = 386'),
    ({'shared': 4}, 'must be below layers'),
    ({'dense': 4}, 'must be below layers'),
    ({'window': 0}, 'shape.window = 0'),
  )
  def test_a_shape_that_makes_no_ladder_is_named(self, changes, words):
    with self.assertRaisesRegex(ds.InputError, words):
      dataclasses.replace(SIZES['half_hour'].shape, **changes)


def write_run(folder, trial, bits, last):
  """Writes what a run of the ladder leaves."""
  workdir = folder / trial.name
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / 'config.json').write_text(json.dumps(ds.to_dict(trial.config)))
  rows = [{'step': i + 1, 'loss': 9.0} for i in range(8)]
  rows += [{'step': i + 9, 'loss': last} for i in range(2)]
  steps = trial.config.evaluate.at
  rows += [
    {'step': step, measured.VALIDATED: value}
    for step, value in zip(steps, bits)
  ]
  lines = '\n'.join(map(json.dumps, rows)) + '\n'
  (workdir / 'metrics.jsonl').write_text(lines)
  (workdir / 'timings.jsonl').write_text('')
  held = {'documents': 3, 'bytes': 1000, 'bits_per_byte': bits[-1]}
  reached = {
    'seconds': 36.0,
    'data': {'heldout_sha256': 'ab' * 32},
    'heldout': held,
    'versions': {'jax': '0.10.2', 'python': '3.11.7'},
    'machine': {'platform': 'cpu'},
  }
  (workdir / 'results.json').write_text(json.dumps(reached))


class ConclusionTest(absltest.TestCase):
  """A ladder of three rungs whose numbers are made up."""

  def setUp(self):
    super().setUp()
    folder = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(folder)
    self.size = dataclasses.replace(
      SIZES['half_hour'], rates=(2e-3, 4e-3), anchors=()
    )
    arms = rungs.climbed(self.size)
    self.arms = {name: arms[name] for name in ('gqa', 'coarse', 'fine')}
    self.tried = trials.rate_trials(self.arms, self.size)
    for trial in self.tried:
      peak = trial.config.train.schedule.peak
      best = 4e-3 if trial.rung == 'fine' else 2e-3
      write_run(self.folder, trial, (3.0,), 2.0 + (peak != best))
    self.ended = measured.ended(self.folder, self.tried)
    self.rates = self.best()
    self.runs = trials.further_trials(self.arms, self.size, self.rates)
    shift = {'gqa': 0.0, 'coarse': 0.04, 'fine': -0.05}
    for trial in self.runs:
      n = trial.config.evaluate.at.index(trial.until) + 1
      noise = 0.001 * trial.config.seed
      bits = [3.0 - 0.3 * i + shift[trial.rung] + noise for i in range(n)]
      write_run(self.folder, trial, bits, 2.0)

  def best(self, ended=None, **changes):
    size = dataclasses.replace(self.size, **changes)
    ended = self.ended if ended is None else ended
    return trials.best_rates(self.folder, self.arms, size, ended)

  def conclusion(self, **changes):
    given = {
      'folder': self.folder,
      'arms': self.arms,
      'trials': (self.tried, self.runs),
      'rates': self.rates,
      'size': self.size,
      'first': 'gqa',
    } | changes
    return measured.conclusion(**given) | {'command': 'x', 'name': 'half_hour'}

  def test_the_rate_of_the_least_last_loss_is_taken(self):
    self.assertEqual(self.rates, {'gqa': 2e-3, 'coarse': 2e-3, 'fine': 4e-3})
    gone = self.tried[0].name
    self.assertEqual(self.best(self.ended - {gone})['gqa'], 4e-3)
    without = {name for name in self.ended if not name.startswith('gqa')}
    self.assertEqual(set(self.best(without)), {'coarse', 'fine'})

  def test_other_rungs_take_the_rate_of_their_anchor(self):
    self.assertEqual(
      self.best(anchors=('coarse',)), dict.fromkeys(self.arms, 2e-3)
    )
    rates = self.best(anchors=('gqa', 'fine'))
    self.assertEqual(rates, {'gqa': 2e-3, 'coarse': 2e-3, 'fine': 4e-3})
    size = dataclasses.replace(self.size, anchors=('coarse',))
    made = trials.rate_trials(self.arms, size, ['fine'])
    self.assertEqual({trial.rung for trial in made}, {'coarse'})
    self.assertEqual(trials.rate_trials(self.arms, self.size, ['fine'])[0].rung,
                     'fine')  # fmt: skip

  def test_a_better_rung_needs_less_compute_and_a_worse_one_more(self):
    found = self.conclusion()
    ratio = {name: found['reach'][name]['ratio'] for name in self.arms}
    self.assertEqual(ratio['gqa'], 1)
    self.assertLess(ratio['fine'], 0.95)
    self.assertGreater(ratio['coarse'], 1.05)
    self.assertFalse(found['reach']['coarse']['measured'])
    self.assertTrue(found['reach']['fine']['measured'])
    self.assertAlmostEqual(found['differences']['coarse']['mean'], 0.04)
    self.assertEqual(found['differences']['fine']['below'], 'coarse')
    self.assertEqual(found['lacking'], [])
    json.dumps(found, allow_nan=False)

  def test_the_page_says_what_did_not_pay(self):
    found = self.conclusion()
    text = table.page(found, 'ladder')
    self.assertIn('| gqa → coarse |', text)
    self.assertRegex(text, r'\+0\.040 ± 0\.000: worse')
    self.assertRegex(text, r'-0\.090 ± 0\.000: better')
    self.assertRegex(text, r'\| coarse \|.* 1\.\d\d \(.*\) \* \|')
    self.assertIn('](ladder.png)', text)
    self.assertIn('| fine | 3.000 | **2.000** | at the edge |', text)
    picture = self.folder / 'picture.png'
    figure.draw(found, picture)
    self.assertEqual(picture.read_bytes()[:4], b'\x89PNG')

  def test_a_rung_without_a_curve_is_named_and_left_out(self):
    lost = next(t for t in self.runs if t.rung == 'coarse')
    (self.folder / lost.name / 'metrics.jsonl').write_text('')
    found = self.conclusion()
    self.assertEqual(found['lacking'], ['coarse'])
    self.assertNotIn('coarse', found['reach'])
    self.assertIn('Without a curve yet: coarse.', table.page(found, 'x'))
    with self.assertRaisesRegex(ds.InputError, "'coarse', which the others"):
      self.conclusion(first='coarse')

  def test_the_planner_counts_what_an_idea_saves(self):
    plan = self.conclusion()['rungs']
    run = self.arms['fine']
    window = run.data.seq_len
    made = costs.cost(run.model, window, window)
    self.assertEqual(plan['fine']['plan']['cache'], made.cache)
    self.assertGreater(plan['coarse']['plan']['parameters'], made.active)


if __name__ == '__main__':
  absltest.main()
