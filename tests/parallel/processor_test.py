"""Processors: each kind gets the options that were measured on it."""

import os
import pathlib
import tempfile
import types
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax import say
from deepseek_jax.model.transformer_config import ComputeConfig
from deepseek_jax.parallel import processor as lib

AVX512 = 'fpu sse2 avx avx2 avx512f avx512dq avx512_bf16'
AMX = f'{AVX512} amx_bf16 amx_tile amx_int8'
YNN = 'xla_cpu_experimental_ynn_fusion_type'
INFO = """processor\t: 0
vendor_id\t: {vendor}
model name\t: a name: with a colon
flags\t\t: {flags}

processor\t: 1
vendor_id\t: {vendor}
flags\t\t: {flags}
"""


class ProcessorTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.enter_context(mock.patch.dict(os.environ, XLA_FLAGS=''))
    lib.known.cache_clear()
    self.addCleanup(lib.known.cache_clear)

  def on(self, vendor, flags):
    """Makes this machine's processor another one."""
    made = lib.Processor(vendor, frozenset(flags.split()))
    self.enter_context(mock.patch.object(lib, 'this', lambda: made))

  @parameterized.parameters(
    ('GenuineIntel', AMX, 'Intel AMX', True),
    ('GenuineIntel', AVX512, 'Intel AVX-512', False),
    ('GenuineIntel', 'avx avx2', '', False),
    ('AuthenticAMD', AVX512, 'AMD AVX-512', False),
    ('AuthenticAMD', 'avx avx2', 'AMD AVX2', False),
    ('AuthenticAMD', 'sse2', '', False),
    ('HygonGenuine', AVX512, '', False),
    # Flags are whole words.
    ('GenuineIntel', 'avx512foo amx_bf16x', '', False),
  )
  def test_vendor_and_flags_tell_the_kind(self, vendor, flags, kind, bfloat16):
    path = pathlib.Path(tempfile.mkdtemp()) / 'cpuinfo'
    path.write_text(INFO.format(vendor=vendor, flags=flags))
    found = lib.read(path)
    self.assertEqual(found.kind, kind)
    self.assertEqual(found.multiplies_bfloat16, bfloat16)

  @parameterized.parameters(b'', b'\xff\xfe:\n', b'flags\n', None)
  def test_a_machine_that_tells_nothing_has_no_kind(self, content):
    path = pathlib.Path(tempfile.mkdtemp()) / 'cpuinfo'
    if content is not None:
      path.write_bytes(content)
    self.assertEqual(lib.read(path), lib.Processor('', frozenset()))
    self.assertEqual(lib.read(path).kind, '')

  @parameterized.parameters(
    ('GenuineIntel', AMX, {'train', 'prefill'}),
    ('GenuineIntel', AVX512, {'train', 'prefill'}),
    ('AuthenticAMD', AVX512, set()),
    ('AuthenticAMD', 'avx2', set()),
    ('', '', set()),
  )
  def test_options_are_of_a_program_and_a_kind(self, vendor, flags, gain):
    self.on(vendor, flags)
    for program in ('train', 'prefill', 'decode'):
      want = {YNN: ''} if program in gain else {}
      self.assertEqual(lib.options(program), want)

  def test_every_option_of_the_table_is_known_to_this_xla(self):
    # So that a version that renames one is noticed.
    warn = self.enter_context(mock.patch.object(say, 'warn'))
    for options in (lib._ONCE, *lib._GAINS.values()):
      for name, value in options.items():
        self.assertTrue(lib.known(name, value), (jax.__version__, name))
    warn.assert_not_called()

  def test_an_option_that_xla_lacks_is_left_out_and_named(self):
    self.on('GenuineIntel', AMX)
    gains = {('Intel AMX', 'train'): {'xla_cpu_no_such': '1', YNN: ''}}
    self.enter_context(mock.patch.object(lib, '_GAINS', gains))
    warn = self.enter_context(mock.patch.object(say, 'warn'))
    for _ in range(3):
      self.assertEqual(lib.options('train'), {YNN: ''})
    warn.assert_called_once()
    self.assertIn('xla_cpu_no_such', warn.call_args.args[0])

  def test_what_xla_flags_name_is_the_users(self):
    self.on('GenuineIntel', AMX)
    once = set(lib._ONCE)
    for flags, init, train in (
      ('', once, {YNN}),
      (f'--xla_foo=1 --{YNN}=', once, set()),
      (
        '--xla_backend_optimization_level=0',
        once - {'xla_backend_optimization_level'},
        {YNN},
      ),
    ):
      with mock.patch.dict(os.environ, XLA_FLAGS=flags):
        self.assertEqual(set(lib.options('init')), init)
        self.assertEqual(set(lib.options('train')), train)

  def test_weights_are_drawn_a_few_at_a_time(self):
    model = lambda key: [
      jax.random.normal(k, (256, 256)) for k in jax.random.split(key, 16)
    ]
    lowered = jax.jit(model).lower(jax.random.key(0))
    memory = lowered.compile(lib._ONCE).memory_analysis()
    self.assertLess(
      memory.temp_size_in_bytes, 0.3 * memory.output_size_in_bytes
    )

  def test_weights_are_drawn_alike_with_fewer_passes(self):
    draw = lambda key: jax.random.normal(key, (67, 33)) * 0.02
    bits = [
      np.asarray(jax.jit(draw, compiler_options=how)(jax.random.key(3)))
      for how in (lib._ONCE, {'xla_backend_optimization_level': '3'})
    ]
    np.testing.assert_array_equal(*bits)

  def test_programs_compile_and_give_the_same_with_them(self):
    self.on('GenuineIntel', AMX)
    one = lambda x: (x @ x).sum()
    x = jax.random.normal(jax.random.key(0), (32, 32))
    want = jax.jit(one)(x)
    got = jax.jit(one, compiler_options=lib.options('train'))(x)
    self.assertAlmostEqual(float(got), float(want), delta=1e-3)

  def test_other_devices_get_none(self):
    self.on('GenuineIntel', AMX)
    with mock.patch.object(jax, 'default_backend', lambda: 'gpu'):
      self.assertEqual(lib.options('train'), {})
      self.assertEqual(lib.dtype(), 'bfloat16')

  def test_given_ones_take_the_place_of_the_tables(self):
    self.on('GenuineIntel', AMX)
    given = (('xla_cpu_parallel_codegen_split_count', '1'),)
    self.assertEqual(lib.options('train', ()), {})
    self.assertEqual(lib.options('prefill', given), dict(given))
    self.assertEqual(lib.options('decode', given), {})

  @parameterized.parameters(
    ('GenuineIntel', AMX, 'bfloat16'),
    ('GenuineIntel', AVX512, 'float32'),
    # It has instructions for bfloat16, which XLA does not use.
    ('AuthenticAMD', AVX512, 'float32'),
    ('', '', 'float32'),
  )
  def test_no_dtype_is_what_is_multiplied_fastest(self, vendor, flags, want):
    self.on(vendor, flags)
    config = ds.changed(ds.presets.v3_tiny(), {'compute.dtype': None})
    self.assertEqual(config.compute.products, want)
    cast = jax.eval_shape(
      lambda: (m := ds.build(config)).cast(m.init(jax.random.key(0)))
    )
    self.assertEqual(cast['params']['embed'].dtype, want)
    chosen = config.compute.chosen()
    self.assertEqual(chosen.dtype, want)
    self.assertEqual(chosen.xla, tuple(lib.options('train').items()))
    # What is said stays.
    said = ComputeConfig(dtype='float32', xla=()).chosen()
    self.assertEqual((said.dtype, said.xla), ('float32', ()))

  def test_the_line_names_kind_dtype_and_options(self):
    self.on('GenuineIntel', AMX)
    line = lib.described(lib.options('train'), 'bfloat16')
    self.assertEqual(
      line, f'Intel AMX; products in bfloat16; XLA options {YNN}='
    )
    self.on('AuthenticAMD', AVX512)
    line = lib.described(lib.options('train'), 'float32')
    self.assertEqual(line, 'AMD AVX-512; products in float32; XLA options none')

  def test_a_run_on_a_gpu_names_it_and_not_the_host(self):
    self.on('GenuineIntel', AMX)
    gpu = types.SimpleNamespace(platform='gpu', device_kind='NVIDIA H200')
    with mock.patch.object(lib.jax, 'local_devices', lambda: [gpu]):
      line = lib.described({}, 'bfloat16')
    self.assertEqual(
      line, 'NVIDIA H200; products in bfloat16; XLA options none'
    )

  @parameterized.parameters('text', (('a',),), (('a', 1),), ('ab',), ((1, 2),))
  def test_options_that_are_no_pairs_of_texts_are_refused(self, *xla):
    with self.assertRaisesRegex(ds.InputError, r'compute\.xla = .*pairs'):
      ComputeConfig(xla=xla)


if __name__ == '__main__':
  absltest.main()
