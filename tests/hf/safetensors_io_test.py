import json
import os
import struct
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.errors import InputError
from deepseek_jax.hf import safetensors_io


def _tensor(dtype='F32', shape=(2,), offsets=(0, 8)):
  return {
    'dtype': dtype,
    'shape': list(shape),
    'data_offsets': list(offsets),
  }


class HostileTest(parameterized.TestCase):
  def write(self, header, data=b'', length=None):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    path = os.path.join(folder, 'model.safetensors')
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with open(path, 'wb') as file:
      file.write(struct.pack('<Q', len(text) if length is None else length))
      file.write(text + data)
    return path

  @parameterized.named_parameters(
    ('outside', {'a': _tensor(offsets=(0, 8))}, 4, 'outside'),
    ('backwards', {'a': _tensor(offsets=(8, 0))}, 8, 'outside'),
    (
      'overlapping',
      {'a': _tensor(), 'b': _tensor(offsets=(4, 12))},
      12,
      'overlaps',
    ),
    ('hole', {'a': _tensor(), 'b': _tensor(offsets=(12, 20))}, 20, 'hole'),
    ('rest', {'a': _tensor()}, 9, 'belong to no tensor'),
    ('unknown_dtype', {'a': _tensor('F128')}, 8, "unknown dtype 'F128'"),
    ('dtype_no_text', {'a': _tensor(7)}, 8, 'unknown dtype 7'),
    ('wrong_size', {'a': _tensor(shape=(3,))}, 8, 'takes 12'),
    ('negative_shape', {'a': _tensor(shape=(-2,))}, 8, 'shape'),
    ('huge_shape', {'a': _tensor(shape=(2**62, 2**62))}, 8, 'takes'),
    ('bool_shape', {'a': _tensor(shape=(True,))}, 8, 'shape'),
    ('text_offset', {'a': _tensor(offsets=('0', '8'))}, 8, 'data_offsets'),
    ('three_offsets', {'a': _tensor(offsets=(0, 8, 8))}, 8, 'data_offsets'),
    ('extra_field', {'a': {**_tensor(), 'code': 'x'}}, 8, 'must have dtype'),
    ('no_object', {'a': 3}, 8, 'must have dtype'),
    ('no_json', b'{"a":', 0, 'not valid JSON'),
    ('deep_json', b'[' * 100_000, 0, 'not valid JSON'),
    ('list', b'[]', 0, 'holds no JSON object'),
    ('not_utf8', b'{"\xff": 1}', 0, 'not valid JSON'),
    ('twice', b'{"a": 1, "a": 2}', 0, 'occurs twice'),
  )
  def test_header_is_refused(self, header, data, message):
    path = self.write(header, b'\0' * data)
    with self.assertRaisesRegex(InputError, message):
      safetensors_io.read_header(path)

  @parameterized.parameters(
    (100_000_001, 'at most 100000000'), (1000, 'truncated'), (0, 'truncated')
  )
  def test_header_length_is_refused(self, length, message):
    path = self.write({}, length=length)
    with self.assertRaisesRegex(InputError, message):
      safetensors_io.read_header(path)

  def test_file_cut_anywhere_is_refused(self):
    path = self.write({'a': _tensor()}, b'\0' * 8)
    whole = Path(path).read_bytes()
    for size in range(len(whole)):
      with open(path, 'wb') as file:
        file.write(whole[:size])
      with self.assertRaises(InputError):
        safetensors_io.read_header(path)

  def folder(self, weight_map):
    path = self.write({'a': _tensor()}, b'\0' * 8)
    folder = os.path.dirname(path)
    with open(os.path.join(folder, safetensors_io.INDEX), 'w') as file:
      json.dump({'weight_map': weight_map}, file)
    return folder

  @parameterized.parameters(
    '../model.safetensors',
    '/etc/passwd.safetensors',
    'sub/model.safetensors',
    '..\\model.safetensors',
    'model.bin',
    'model.safetensors\0',
    7,
  )
  def test_index_that_leaves_the_folder_is_refused(self, name):
    with self.assertRaisesRegex(InputError, 'in this folder'):
      safetensors_io.read_folder(self.folder({'a': name}))

  def test_index_must_name_files_and_tensors_that_exist(self):
    with self.assertRaisesRegex(InputError, 'other.safetensors, which is miss'):
      safetensors_io.read_folder(self.folder({'a': 'other.safetensors'}))
    file = 'model.safetensors'
    with self.assertRaisesRegex(InputError, "'b' is not in"):
      safetensors_io.read_folder(self.folder({'a': file, 'b': file}))
    with self.assertRaisesRegex(InputError, 'does not list it'):
      safetensors_io.read_folder(self.folder({'b': file}))
    with self.assertRaisesRegex(InputError, 'has no weight_map'):
      safetensors_io.read_folder(self.folder([]))

  def test_only_safetensors_are_read(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    Path(folder, 'pytorch_model.bin').write_bytes(b'')
    with self.assertRaisesRegex(InputError, 'holds neither'):
      safetensors_io.read_folder(folder)


class RoundTripTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    folder = self.enterContext(tempfile.TemporaryDirectory())
    self.path = os.path.join(folder, 'x.safetensors')

  def test_the_reference_package_reads_what_is_written(self):
    from safetensors.numpy import load_file

    draw = np.random.default_rng(0)
    tensors = {
      'b': draw.standard_normal((5, 3)).astype(np.float32),
      'a': draw.standard_normal(7).astype(np.float16),
      'empty': np.zeros((0, 4), np.float32),
    }
    writer = safetensors_io.Writer(
      self.path, {k: (v.dtype, v.shape) for k, v in tensors.items()}
    )
    writer.write('a', tensors['a'])
    for start in (2, 0, 4):  # rows in any order
      writer.write('b', tensors['b'][start : start + 2], start)
    self.assertFalse(os.path.exists(self.path))
    writer.close()
    for name, value in load_file(self.path).items():
      np.testing.assert_array_equal(value, tensors[name])

  @parameterized.parameters('float32', 'bfloat16', 'float8_e4m3fn')
  def test_rows_are_read_of_what_the_reference_package_writes(self, dtype):
    from safetensors.numpy import save_file

    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    value = np.random.default_rng(0).standard_normal((9, 4)).astype(dtype)
    save_file({'x': value, 'y': value[:2]}, self.path)
    entry = safetensors_io.read_header(self.path)['x']
    read = safetensors_io.read(entry, 3, 7)
    self.assertEqual(read.dtype, dtype)
    np.testing.assert_array_equal(
      read.astype(np.float32), value[3:7].astype(np.float32)
    )

  def test_file_that_shrinks_while_read_is_an_error(self):
    writer = safetensors_io.Writer(self.path, {'x': (np.float32, (4,))})
    writer.write('x', np.ones(4, np.float32))
    writer.close()
    entry = safetensors_io.read_header(self.path)['x']
    os.truncate(self.path, os.path.getsize(self.path) - 4)
    with self.assertRaisesRegex(InputError, 'truncated'):
      safetensors_io.read(entry)


if __name__ == '__main__':
  absltest.main()
