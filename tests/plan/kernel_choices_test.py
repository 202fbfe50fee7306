"""Which operations would run as kernels: for what GPU, on what mesh."""

import io
from unittest import mock

from absl.testing import absltest, parameterized
from rich.console import Console

import deepseek_jax as ds
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.plan import compiled, kernel_choices, tables
from deepseek_jax.plan.compiled import Program
from deepseek_jax.plan.kernel_choices import Chosen
from tests import tiny
from tests.model.kernels_mesh_worker import config
from tests.plan.report_test import TINY, launch


class KernelChoicesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('a100', '8.0'),
    ('h100', '9.0'),
    ('h800', '9.0'),
    ('gb200', '10.0'),
    ('v5p', 'tpu'),
  )
  def test_an_accelerator_has_a_capability(self, name, want):
    self.assertEqual(kernel_choices.capability(name), want)

  def test_one_without_is_named(self):
    with self.assertRaisesRegex(ds.InputError, '--cluster=mi300: its compute'):
      kernel_choices.capability('mi300')

  def test_a_large_mesh_keeps_what_cuts_heads_and_sequences(self):
    big = MeshConfig(data=6, fsdp=16, expert=64, tensor=4, context=2, stage=16)
    made = kernel_choices.small(big)
    self.assertLessEqual(made.devices, compiled.MOST)
    self.assertEqual((made.tensor, made.context, made.stage), (4, 2, 1))
    self.assertEqual(64 % made.expert, 0)
    whole = MeshConfig(data=2, fsdp=4, tensor=2)
    self.assertEqual(kernel_choices.small(whole), whole)

  @parameterized.parameters('8.0', '10.0')
  def test_other_gpus_get_no_kernel_and_the_reason(self, gpu):
    program = Program(tiny.config('v3'), MeshConfig(), 16)
    chosen = kernel_choices.list_here(program, gpu)
    self.assertEqual({c.phase for c in chosen}, set(kernel_choices.PHASES))
    self.assertEqual({c.impl for c in chosen}, {'reference'})
    reason = f'the target, cuda {gpu}, is not a Hopper GPU'
    self.assertEqual({c.reason for c in chosen}, {reason})

  def test_a_tpu_gets_its_kernels_and_xlas_code_for_the_rest(self):
    program = Program(config('v3'), MeshConfig(), 16)
    chosen = kernel_choices.list_here(program, 'tpu')
    kernels = {
      phase: set(kernel_choices.kernels_of(chosen, phase))
      for phase in kernel_choices.PHASES
    }
    forward, outer = 'grouped_matmul.forward', 'grouped_matmul.outer'
    self.assertEqual(kernels['train'], {forward, outer})
    # Nothing but a gradient transposes weights.
    self.assertEqual(kernels['prefill'], set())
    self.assertEqual(kernels['decode'], {'mla_decode'})
    self.assertEqual(kernels['engine'], {'mla_decode'})
    reasons = {c.reason for c in chosen if c.impl == 'reference'}
    self.assertIn('there is no kernel for TPUs', reasons)
    # The engine's pages, as they are.
    [pages] = [c for c in chosen if (c.phase, c.op) == ('engine', 'mla_decode')]
    self.assertEqual(pages.impl, 'tpu')

  def test_sparse_attention_reads_the_engines_pages(self):
    program = Program(config('v32'), MeshConfig(), 256)
    chosen = kernel_choices.list_here(program, '9.0')
    read = {
      c.phase: c.shapes
      for c in chosen
      if (c.op, c.impl) == ('sparse_mla', 'gpu')
    }
    # 16 rows of five pages of 64 tokens, and the page that is nobody's.
    self.assertIn(f'bfloat16[1,{81 * 64},512]', read['engine'])
    self.assertIn('int32[1,16,64]', read['engine'])
    self.assertIn('bfloat16[1,320,512]', read['decode'])

  def test_the_table_says_what_runs_without_a_kernel(self):
    def shown(*chosen):
      program = Program(tiny.config('v3'), MeshConfig(fsdp=2), 16)
      out = io.StringIO()
      Console(file=out, width=200).print(
        tables.render_kernels('v3', program, list(chosen))
      )
      return out.getvalue()

    one = Chosen('train', 'router', 'gpu', '', 'float32[2,8]', 3)
    other = Chosen('decode', 'mla_decode', 'reference', 'odd', 'int32[3]', 1)
    self.assertIn('every operation that has a kernel', shown(one))
    text = shown(one, other)
    self.assertIn('traced on fsdp=2, 1 x 16 tokens per device', text)
    self.assertIn('without a kernel: mla_decode', text)
    self.assertRegex(text, r'decode .* mla_decode .* XLA: odd .* int32\[3\]')

  def test_a_failed_process_shows_its_last_lines(self):
    program = Program(tiny.config('v3'), MeshConfig(), 16)
    done = mock.Mock(returncode=1, stderr='a\nb\nBoom: here', stdout='')
    with (
      mock.patch.object(compiled, 'run', lambda *_: done),
      self.assertRaisesRegex(RuntimeError, 'Boom: here'),
    ):
      kernel_choices.kernel_choices(program, '9.0')

  def test_on_the_command_line(self):
    flags = f'--config={TINY}', '--config.model.compute.dtype=bfloat16'
    done = launch(*flags, '--cluster=h100x2', '--kernels', seconds=600)
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn('traced on fsdp=2', done.stdout)
    # 48 key dims of the tiny model are no 192.
    self.assertIn('mla_prefill', done.stdout.rpartition('without a kernel:')[2])
    done = launch(*flags, '--cluster=v5p', '--kernels', seconds=600)
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn('there is no kernel for TPUs', done.stdout)


if __name__ == '__main__':
  absltest.main()
