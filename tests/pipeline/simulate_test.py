"""Schedules as data reproduce the published bubbles when simulated."""

import collections
import itertools

from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.pipeline import chunk_orders as schedules
from deepseek_jax.pipeline.simulate import Durations, simulate
from deepseek_jax.plan.bubbles import method


class OneFOneBTest(parameterized.TestCase):
  @parameterized.product(
    ranks=(1, 2, 4, 7),
    micro=(8, 13),
    times=(Durations(), Durations(3, 5, 2), Durations(10, 19, 9)),
  )
  def test_every_rank_idles_for_the_formula(self, ranks, micro, times):
    line = simulate(schedules.one_f_one_b(ranks, micro), times)
    want = method('1f1b', ranks, times).bubble
    self.assertEqual([line.idle(r) for r in range(ranks)], [want] * ranks)
    work = micro * (times.forward + times.backward)
    self.assertEqual(line.length, work + want)

  def test_fewer_micro_batches_than_ranks(self):
    line = simulate(schedules.one_f_one_b(6, 2), Durations())
    self.assertEqual(line.length, (2 + 6 - 1) * 3)

  def test_activations_alive_are_at_most_the_formulas(self):
    self.assertEqual(most_alive(schedules.one_f_one_b(5, 12)), [5, 4, 3, 2, 1])
    self.assertEqual(method('1f1b', 5, Durations()).activations, 5)


def most_alive(schedule):
  """Most micro-batches between forward and backward, per rank."""
  out = []
  for steps in schedule:
    alive = most = 0
    for step in steps:
      for chunk in step:
        alive += {'F': 1, 'B': -1, 'I': -1, 'W': 0}[chunk.kind]
        most = max(most, alive)
    out.append(most)
  return out


class DualPipeTest(parameterized.TestCase):
  # Exact where forward, input gradient and weight gradient take equal time.
  @parameterized.product(
    shape=((2, 4), (4, 8), (4, 14), (8, 20), (8, 32), (16, 40)),
    times=(
      Durations(1, 2, 1),
      Durations(10, 20, 10),
      Durations(10, 20, 10, overlapped=25),
      Durations(4, 8, 4, overlapped=9),
    ),
  )
  def test_the_busiest_wait_is_the_formula(self, shape, times):
    line = simulate(schedules.dualpipe(*shape), times)
    want = method('dualpipe', shape[0], times).bubble
    self.assertEqual(line.bubble, want)

  @parameterized.parameters(
    (4, 12, Durations(10, 20, 8, overlapped=28)),
    (8, 40, Durations(10, 20, 8, overlapped=28)),
    (16, 64, Durations(10, 20, 8)),
  )
  def test_unequal_thirds_leave_it_a_little_below(self, ranks, micro, times):
    line = simulate(schedules.dualpipe(ranks, micro), times)
    want = method('dualpipe', ranks, times).bubble
    self.assertLess(line.bubble, want)
    self.assertGreater(line.bubble, 0.85 * want)

  @parameterized.parameters((2, 4), (8, 20), (16, 32))
  def test_every_chunk_runs_once_everywhere(self, ranks, micro):
    for steps in schedules.dualpipe(ranks, micro):
      count = collections.Counter(
        (c.kind if c.kind != 'I' else 'B', c.direction)
        for step in steps
        for c in step
        if c.kind != 'W'
      )
      want = {(k, d): micro // 2 for k in 'FB' for d in (0, 1)}
      self.assertEqual(count, want)
      put_off = [c[1:] for s in steps for c in s if c.kind == 'I']
      made_up = [c[1:] for s in steps for c in s if c.kind == 'W']
      self.assertEqual(put_off, made_up)

  def test_beats_the_others_as_published(self):
    times = Durations(10, 20, 10, overlapped=28)
    bubble = {
      s: method(s, 16, times).bubble for s in ('1f1b', 'zb1p', 'dualpipe')
    }
    self.assertEqual(bubble, {'1f1b': 450, 'zb1p': 150, 'dualpipe': 126})
    self.assertEqual(method('dualpipe', 16, times).activations, 17)
    self.assertEqual(method('dualpipev', 16, times).weights, 2)

  def test_a_rank_holds_at_most_one_micro_batch_more(self):
    self.assertLessEqual(max(most_alive(schedules.dualpipe(8, 32))), 8 + 1)

  @parameterized.parameters((3, 8), (4, 9), (4, 6), (0, 4))
  def test_what_it_cannot_do_is_said(self, ranks, micro):
    with self.assertRaisesRegex(ds.InputError, 'micro_batches'):
      schedules.dualpipe(ranks, micro)


class SimulatorTest(parameterized.TestCase):
  def test_order_and_dependencies_hold(self):
    line = simulate(schedules.dualpipe(4, 10), Durations(3, 7, 2))
    end = {}
    for span in line.spans:
      for chunk in span.step:
        end[span.rank, chunk.kind, chunk.direction, chunk.index] = span.end
    for span in line.spans:
      for kind, direction, index in span.step:
        before = span.rank + (1 if direction else -1)
        if kind == 'F' and 0 <= before < 4:
          need = end[before, 'F', direction, index]
          self.assertLessEqual(need, span.start)
        if kind == 'W':
          need = end[span.rank, 'I', direction, index]
          self.assertLessEqual(need, span.start)
    for rank in range(4):
      mine = sorted(s for s in line.spans if s.rank == rank)
      for a, b in itertools.pairwise(mine):
        self.assertLessEqual(a.end, b.start)

  def test_a_schedule_that_waits_for_itself(self):
    chunk = schedules.Chunk
    stuck = (((chunk('B', 0, 0),), (chunk('F', 0, 0),)),)
    with self.assertRaisesRegex(ds.InputError, 'rank 0 waits forever'):
      simulate(stuck, Durations())

  def test_unknown_names_and_odd_stages(self):
    with self.assertRaisesRegex(ds.InputError, 'gpipe'):
      method('gpipe', 4, Durations())
    with self.assertRaisesRegex(ds.InputError, 'stages = 5'):
      method('dualpipe', 5, Durations())
    with self.assertRaisesRegex(ds.InputError, 'durations.weight'):
      Durations(1, 2, 3)


if __name__ == '__main__':
  absltest.main()
