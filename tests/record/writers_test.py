"""Writers beside metrics.jsonl: TensorBoard, wandb, one's own."""

import pathlib
import sys
import tempfile
import types
from unittest import mock

from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax.record import metrics, writers
from deepseek_jax.run import profile


class _Own:
  """Keeps what it is given."""

  def __init__(self):
    self.rows, self.closed = [], 0

  def write(self, step, scalars, timings):
    self.rows.append((step, dict(scalars), dict(timings)))

  def close(self):
    self.closed += 1


class _FakeWandb(types.SimpleNamespace):
  def __init__(self):
    super().__init__(calls=[], logged=[], finished=0)

  def init(self, **fields):
    self.calls.append(fields)
    return types.SimpleNamespace(
      log=lambda row, step: self.logged.append((step, row)),
      finish=lambda: setattr(self, 'finished', self.finished + 1),
    )


class WritersTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    root = self.enter_context(tempfile.TemporaryDirectory())
    self.folder = pathlib.Path(root)

  def test_ones_own_gets_every_line_and_is_closed_once(self):
    own = _Own()
    with metrics.MetricsWriter(
      self.folder, console=False, writers=[own]
    ) as writer:
      writer.write(1, {'loss': 2.0}, {'seconds': 0.5})
      writer.write(1, {'validation': 1.0})
      writer.close()
    self.assertEqual(
      own.rows,
      [(1, {'loss': 2.0}, {'seconds': 0.5}), (1, {'validation': 1.0}, {})],
    )
    self.assertEqual(own.closed, 1)
    self.assertLen(metrics.read(self.folder), 2)

  def test_it_is_closed_after_an_error(self):
    own = _Own()
    with (
      self.assertRaises(ds.InputError),
      metrics.MetricsWriter(self.folder, console=False, writers=[own]) as w,
    ):
      w.write(1, {'loss': 'high'})
    self.assertEqual(own.closed, 1)

  def test_a_run_keeps_its_page(self):
    fake = _FakeWandb()
    with mock.patch.dict(sys.modules, wandb=fake):
      for step in (1, 2):
        made = writers.WandB(self.folder, 'lab', {'seed': 3})
        made.write(step, {'loss': 2.0}, {'seconds': 0.5})
        made.close()
    first, second = fake.calls
    self.assertEqual(first, second)
    self.assertEqual(first['project'], 'lab')
    self.assertEqual(first['config'], {'seed': 3})
    self.assertEqual(first['resume'], 'allow')
    self.assertEqual(fake.logged[1], (2, {'loss': 2.0, 'timings/seconds': 0.5}))
    self.assertEqual(fake.finished, 2)

  def test_a_package_that_is_missing_is_named(self):
    with (
      mock.patch.dict(sys.modules, wandb=None),
      self.assertRaisesRegex(ds.InputError, 'needs wandb: pip install wandb'),
    ):
      writers.WandB(self.folder, 'lab', {})
    with (
      mock.patch.dict(sys.modules, tensorboardX=None),
      self.assertRaisesRegex(ds.InputError, 'needs tensorboardX'),
    ):
      writers.TensorBoard(self.folder, None)

  def test_tensorboard_has_the_configuration_and_what_it_reached(self):
    board = writers.TensorBoard(self.folder, None)
    board.write(1, {'loss': 2.0}, {'seconds': 0.5})
    board.hparams({'model.dim': 8, 'train.trainable': []}, {'bits': 1.5})
    board.close()
    files = [p for p in self.folder.rglob('*tfevents*') if p.is_file()]
    data = b''.join(p.read_bytes() for p in files)
    for words in (b'loss', b'timings/seconds', b'model.dim', b'bits'):
      self.assertIn(words, data)


class ProfileTest(absltest.TestCase):
  def test_steps_are_read(self):
    self.assertEqual(profile.steps('10:12'), (10, 12))
    self.assertEqual(profile.steps('3'), (3, 3))
    for text in ('', '0:2', '3:2', 'a:b', '1:2:3', '-1'):
      with self.assertRaisesRegex(ds.InputError, '--profile='):
        profile.steps(text)

  def test_traces_the_steps_asked_for_and_ends_after_an_error(self):
    calls = []
    start = lambda path, **_: calls.append(('start', path))
    stop = lambda: calls.append('stop')
    with (
      mock.patch('jax.profiler.start_trace', start),
      mock.patch('jax.profiler.stop_trace', stop),
    ):
      trace = profile.Profile((2, 3), pathlib.Path('p'))
      told = []
      for number in range(1, 6):
        trace.before(number)
        calls.append(number)
        told.append(trace.after(number))
      self.assertEqual(calls, [1, ('start', 'p'), 2, 3, 'stop', 4, 5])
      self.assertEqual([bool(t) for t in told], [0, 0, 1, 0, 0])
      trace.close()
      trace = profile.Profile((2, 9), pathlib.Path('p'))
      trace.before(2)
      trace.close()
      trace.close()
    self.assertEqual(calls[-2:], [('start', 'p'), 'stop'])


if __name__ == '__main__':
  absltest.main()
