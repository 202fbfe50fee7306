"""Files beside whole checkpoints: damaged ones are set aside, runs go on."""

import io
import json
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax import say
from deepseek_jax.errors import InputError
from deepseek_jax.record import flight, last_steps, metrics, timeline
from tests.faults import ledger, runs


def _other_npz() -> bytes:
  file = io.BytesIO()
  np.savez(file, a=np.arange(3))
  return file.getvalue()


def _pickled() -> bytes:
  file = io.BytesIO()
  np.savez(file, _settings=np.array([{}], object))
  return file.getvalue()


def _flipped(content: bytes) -> bytes:
  middle = len(content) // 2
  return content[:middle] + bytes([content[middle] ^ 8]) + content[middle + 1 :]


_NPZ = {
  'cut': lambda b: b[: len(b) // 2],
  'empty': lambda b: b'',
  'garbage': lambda b: bytes(range(256)) * 9,
  'one_bit': _flipped,
  'another_npz': lambda b: _other_npz(),
  'pickled': lambda b: _pickled(),
  'an_array': lambda b: b'\x93NUMPY' + bytes(90),
  'text': lambda b: b'version https://git-lfs.github.com/spec/v1\n',
}
_LINES = {
  'nuls': lambda b: b + bytes(64) + b'\n',
  'not_utf8': lambda b: b + b'{"phase": "caf\xe9", "seconds": 1}\n',
  'a_list': lambda b: b'[1, 2]\n' + b,
  'a_string': lambda b: b + b'"step"\n',
  'deep': lambda b: b + b'[' * 20000 + b'\n',
  'other_fields': lambda b: b + b'{"step": "three", "seconds": "x"}\n',
  'infinite': lambda b: b + b'{"step": 1e999, "seconds": 1e999}\n',
}
_DAMAGES = [
  *((f'routing_{n}', 'routing.npz', d) for n, d in _NPZ.items()),
  *(
    (f'{file}_{n}', f'{file}.jsonl', d)
    for file in ('timeline', 'metrics')
    for n, d in _LINES.items()
  ),
  ('timings_nuls', 'timings.jsonl', _LINES['nuls']),
]


class FinishedTest(runs.RunTest, parameterized.TestCase):
  """A run of 8 steps that is done, and started again."""

  def again(self) -> list[str]:
    """What a further start says on stderr."""
    with mock.patch.object(say, 'warn') as warned:
      self.fit('run')
    return [call.args[0] for call in warned.call_args_list]

  def setUp(self):
    super().setUp()
    runs.straight()
    shutil.copytree(runs.home() / 'straight', self.folder / 'run')

  def test_every_damage_is_one_line_and_nothing_is_lost(self):
    for name, file, damage in _DAMAGES:
      path = self.folder / 'run' / file
      shutil.rmtree(path.parent)
      shutil.copytree(runs.home() / 'straight', path.parent)
      before = path.read_bytes()
      path.write_bytes(damage(before))
      damaged = path.read_bytes()
      with self.subTest(name), ledger.fault(f'{file} damaged'):
        lines = self.again()
        self.assertLen(lines, 1, msg=lines)
        self.assertIn(f'{path}', lines[0])
        aside = path.with_name(f'{file}.damaged-1')
        self.assertIn(f'now {aside.name}', lines[0])
        self.assertNotIn('\n', lines[0])
        self.assertEqual(aside.read_bytes(), damaged)
        if file == 'metrics.jsonl':
          self.assertEqual(path.read_bytes(), before)

  def test_lost_and_short_files_are_said_in_one_line_each(self):
    run = self.folder / 'run'
    lines = (run / 'metrics.jsonl').read_bytes().splitlines(keepends=True)
    self.assertLen(lines, 8)
    (run / 'metrics.jsonl').write_bytes(b''.join(lines[:2] + lines[4:7]))
    for name in ('timings.jsonl', 'timeline.jsonl', 'routing.npz'):
      (run / name).unlink()
    said = self.again()
    self.assertLen(said, 4, msg=said)
    self.assertIn('metrics.jsonl lacks steps 3 to 4, step 8: they are', said[1])
    self.assertIn('timings.jsonl lacks steps 1 to 8', said[2])
    self.assertIn('timeline.jsonl is gone', said[0])
    self.assertIn('routing.npz is gone: how steps up to 8', said[3])

  def test_routing_of_another_model_is_kept_under_another_name(self):
    path = self.folder / 'run' / 'routing.npz'
    settings, columns = flight.load_columns(path)
    for name in ('load', 'bias'):
      columns[name] = columns[name][..., :4]
    text = np.frombuffer(json.dumps(settings).encode(), np.uint8)
    np.savez(path, _settings=text, **columns)
    (said,) = self.again()
    self.assertIn('of shape (1, 4), not (1, 8)', said)
    self.assertTrue(path.with_name('routing-until-8.npz').exists())

  def test_a_run_goes_on_bit_for_bit_with_all_files_damaged(self):
    shutil.rmtree(self.folder / 'run')
    stop = mock.Mock(side_effect=KeyboardInterrupt)
    with self.before_step(5, stop), self.assertRaises(KeyboardInterrupt):
      self.fit('run')
    for _, file, damage in (_DAMAGES[0], _DAMAGES[8], _DAMAGES[16]):
      path = self.folder / 'run' / file
      path.write_bytes(damage(path.read_bytes()))
    with mock.patch.object(say, 'warn') as warned:
      run = self.fit('run')
    self.assertEqual(warned.call_count, 3)
    self.assert_same_as_straight('run', run)


class FilesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = Path(self.enter_context(tempfile.TemporaryDirectory()))

  def test_damaged_files_never_overwrite_each_other(self):
    for content in ('a', 'b', 'c'):
      (self.folder / 'f').write_text(content)
      metrics.set_aside(self.folder / 'f')
    kept = sorted(p.name for p in self.folder.iterdir())
    self.assertEqual(kept, [f'f.damaged-{n}' for n in (1, 2, 3)])
    self.assertEqual((self.folder / kept[2]).read_text(), 'c')

  def test_readers_name_the_line(self):
    path = self.folder / 'metrics.jsonl'
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": [2]}\n')
    with self.assertRaisesRegex(InputError, 'line 2 is not a line of metrics'):
      metrics.read(self.folder)
    with self.assertRaisesRegex(InputError, 'line 2 is not a line of metrics'):
      metrics.MetricsWriter(self.folder, console=False)
    (self.folder / last_steps.FILE).write_text('{"step": 3}\n')
    with self.assertRaisesRegex(InputError, 'line 1 is not a step of a run'):
      last_steps.read(self.folder)

  def test_a_damaged_recording_is_named(self):
    path = self.folder / 'routing.npz'
    for name, damage in _NPZ.items():
      path.write_bytes(damage(b'PK' + bytes(99)))
      with self.subTest(name), self.assertRaises(flight.DamagedFile) as caught:
        flight.load(path)
      self.assertIn(f'{path} is damaged (', str(caught.exception))

  def test_times_that_can_be_read_are_added_up(self):
    path = self.folder / 'timeline.jsonl'
    path.write_bytes(
      b'{"phase": "step", "seconds": 1.5}\n\0\0\n{"phase": "step", "seconds'
    )
    self.assertEqual(timeline.totals(path), {'step': 1.5})


if __name__ == '__main__':
  absltest.main()
