"""The compiled step: its mesh, its warnings, its bytes."""

import dataclasses
import io
import os
from unittest import mock

from absl.testing import absltest, parameterized
from rich.console import Console

import deepseek_jax as ds
from deepseek_jax.config import from_dict, to_dict
from deepseek_jax.parallel.exchange import ExchangeConfig
from deepseek_jax.plan import compiled, tables
from deepseek_jax.plan.compiled_collectives import Total
from tests import tiny

WARNING = (
  'W1122 18:37:33.5 25974 spmd_partitioner.cc:656] [SPMD] Involuntary full'
  ' rematerialization. The compiler cannot go from sharding {devices=[4,1,1]'
  '<=[4]} to {devices=[1,1,2,2]<=[2,2]T(1,0) last_tile_dim_replicate}'
  ' efficiently for HLO operation %copy.4 = f32[1,12,16]{2,1,0} copy(%a.36),'
  ' sharding={devices=[4,1,1]<=[4]}, metadata={op_name="jit(f)/add_any"'
  ' stack_frame_id=109}. As the last resort, SPMD will replicate the tensor.'
)
UNNAMED = WARNING.replace(', metadata={op_name="jit(f)/add_any"', ', x={"a"')

# Cut by rows, wanted cut by columns: XLA:CPU gathers it whole, and says so.
GATHERED = """
import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2, 2), ('a', 'b'), axis_types=(AxisType.Auto,) * 2)
rows = NamedSharding(mesh, P(('a', 'b'), None, None))
columns = NamedSharding(mesh, P(None, None, 'b'))
cut = lambda x: jax.lax.with_sharding_constraint(jax.numpy.sin(x), columns)
step = jax.jit(cut, in_shardings=rows, out_shardings=columns)
step.lower(jax.ShapeDtypeStruct((8, 16, 16), 'float32')).compile()
"""


class ParseTest(parameterized.TestCase):
  @parameterized.parameters(
    ('8x4', {'data': 8, 'fsdp': 4}),
    ('1x2x4x8x2', {'fsdp': 2, 'expert': 4, 'tensor': 8, 'context': 2}),
    ('expert=4,tensor=2', {'expert': 4, 'tensor': 2}),
    ('16', {'data': 16}),
  )
  def test_meshes(self, text, sizes):
    got = compiled.parse_mesh(text)
    self.assertEqual(got, compiled.MeshConfig(**sizes))

  def test_an_axis_given_twice_is_named(self):
    with self.assertRaisesRegex(ds.InputError, 'fsdp is given twice'):
      compiled.parse_mesh('fsdp=2,expert=2,fsdp=4')

  @parameterized.parameters('8xx4', 'a=4', '8,4', '', 'fsdp=x', '1x1x1x1x1x1x1')
  def test_mistakes_say_how_to_write_it(self, text):
    with self.assertRaisesRegex(ds.InputError, 'write 8x4x2'):
      compiled.parse_mesh(text)


class ProgramTest(parameterized.TestCase):
  @parameterized.parameters(
    ({'stage': 2}, 'mesh.stage = 2'),
    ({'data': 512}, '512 devices: at most 256'),
    ({'context': 3}, 'mesh.context = 3'),
  )
  def test_what_cannot_be_compiled_is_named(self, sizes, message):
    with self.assertRaisesRegex(ds.InputError, message):
      compiled.Program(
        tiny.config('v3'), compiled.MeshConfig(**sizes), seq_len=16
      )

  @parameterized.parameters(
    ({'tensor': 3}, 'does not divide by mesh.tensor = 3'),
    (
      {'expert': 2, 'exchange': ExchangeConfig(kind='ragged_all_to_all')},
      'XLA has none for a CPU',
    ),
  )
  def test_what_does_not_fit_is_named_here_and_by_the_process(
    self, changes, message
  ):
    program = compiled.Program(
      tiny.config('v3'), compiled.MeshConfig(**changes), seq_len=16
    )
    for way in (compiled.check, compiled.compile_step):
      with self.assertRaisesRegex(ds.InputError, message):
        way(program)

  def test_survives_json(self):
    program = compiled.Program(
      tiny.config('v3'), compiled.MeshConfig(data=2, expert=4)
    )
    self.assertEqual(from_dict(compiled.Program, to_dict(program)), program)

  def test_warnings_are_shortened(self):
    got = compiled.warnings(f'{WARNING}\nnothing\n{UNNAMED}\n')
    before, after = '{devices=[4,1,1]<=[4]}', '{devices=[1,1,2,2]<=[2,2]T(1,0)'
    self.assertLen(got, 2)
    self.assertStartsWith(got[0], f'f32[1,12,16] jit(f)/add_any: {before} -> ')
    self.assertIn(after, got[0])
    self.assertIn('(unnamed)', got[1])

  @parameterized.parameters('0', '2', '3')
  def test_a_warning_of_xla_is_read_whatever_is_silenced(self, level):
    with mock.patch.dict(os.environ, TF_CPP_MIN_LOG_LEVEL=level):
      done = compiled.run(['-c', GATHERED], 4)
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertLen(compiled.warnings(done.stderr), 1)

  def test_shown_with_what_was_compiled_and_what_it_warns_of(self):
    program = compiled.Program(
      tiny.config('v3'), compiled.MeshConfig(data=2, expert=4), 16
    )
    made = compiled.Compiled(
      1234567,
      2,
      3,
      4,
      {'all-to-all': Total(5, 678901)},
      {'all-gather': Total(1, 2)},
      1,
      ('w', 'w'),
      1.5,
    )
    shown = Console(width=150, file=io.StringIO())
    shown.print(tables.render_compiled('tiny', program, made))
    text = shown.file.getvalue()
    for word in (
      '1,234,567',
      '678,901',
      'all 3 layers',
      'expert 4',
      '2 x w',
      'if needed',
    ):
      self.assertIn(word, text)
    quiet = dataclasses.replace(made, rematerialized=())
    shown = Console(width=150, file=io.StringIO())
    shown.print(tables.render_compiled('tiny', program, quiet))
    self.assertIn('no involuntary', shown.file.getvalue())


if __name__ == '__main__':
  absltest.main()
