"""Names the path that a full disk refused."""

import errno
import resource
import tempfile
from pathlib import Path

import numpy as np
from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax import data, errors
from deepseek_jax.data import token_store as store
from deepseek_jax.record import last_steps, metrics
from deepseek_jax.record.report import page as report
from deepseek_jax.record.routing import FlightRecorder
from deepseek_jax.record.timeline import Timeline
from deepseek_jax.run import folder as folders
from deepseek_jax.run import integrity
from tests.faults import runs


class FullDiskTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))

  def assert_named(self, name, write):
    """`write` meets a disk that takes no byte, at the file `name`."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with self.assertRaises(OSError) as caught:
      resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
      try:
        write()
      finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    self.assertEqual(caught.exception.errno, errno.EFBIG)
    self.assertEqual(caught.exception.filename, str(self.folder / name))

  def test_a_path_that_is_known_stays(self):
    with (
      self.assertRaises(OSError) as caught,
      errors.naming('mine'),
      open('/no/such'),
    ):
      pass
    self.assertEqual(caught.exception.filename, '/no/such')

  def test_metrics(self):
    writer = metrics.MetricsWriter(self.folder, console=False)
    write = lambda: writer.write(1, {'loss': 1.0}, {'seconds': 1.0})
    self.assert_named('metrics.jsonl', write)
    writer.close()

  def test_timeline(self):
    timeline = Timeline(self.folder / 'timeline.jsonl')
    timeline.add('step', 1.0)
    timeline.write()
    self.assert_named('timeline.tmp', lambda: timeline.begin(1))
    timeline.add('step', 1.0)
    self.assert_named('timeline.jsonl', timeline.write)

  def test_last_steps(self):
    kept = last_steps.LastSteps(self.folder / 'abort.jsonl', 3)
    kept.add(1, {}, {'loss': np.float32(1)})
    self.assert_named('abort.tmp', kept.write)

  def test_routing(self):
    recorder = FlightRecorder(
      self.folder / 'routing.npz', {'load': 'sum'}, layers=[0]
    )
    recorder.record(1, load=np.ones((1, 4)))
    self.assert_named('routing.tmp', recorder.save)

  def test_config_and_tokenizer(self):
    config = runs.config(self.folder)
    self.assert_named('config.tmp', lambda: folders.renew(self.folder, config))
    tokenizer = data.ByteTokenizer()
    self.assert_named(
      'tokenizer.json', lambda: tokenizer.save(str(self.folder))
    )

  def test_report(self):
    with metrics.MetricsWriter(self.folder, console=False) as writer:
      writer.write(1, {'loss': 1.0})
    write = lambda: report.write_report(self.folder, title='a', facts={})
    self.assert_named('report.tmp', write)


class DeepTest(absltest.TestCase):
  def test_deep_json_is_one_line_wherever_a_run_reads_it(self):
    folder = Path(self.enter_context(tempfile.TemporaryDirectory()))
    for name in ('tokenizer.json', 'index.json', 'abort.jsonl', 'config.json'):
      (folder / name).write_text('[' * 99_999)
    for read in (
      lambda: data.from_file(str(folder)),
      lambda: store.read_index(str(folder)),
      lambda: last_steps.read(folder),
      lambda: folders.config_of(folder),
      lambda: report.write_report(folder, title='a', facts={}),
    ):
      with self.assertRaises(ds.InputError) as caught:
        read()
      self.assertIn(str(folder), str(caught.exception))
      self.assertNotIn('\n', str(caught.exception))
    (folder / integrity.MANIFEST).write_text('[' * 99_999)
    self.assertIn('cannot be read', integrity.problem(folder))


if __name__ == '__main__':
  absltest.main()
