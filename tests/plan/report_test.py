"""Plans as a whole: the report, its tables and pictures, the launcher."""

import dataclasses
import functools
import io
import json
import math
import pathlib
import subprocess
import sys
import tempfile

import pytest
from absl.testing import absltest, parameterized
from rich.console import Console

import deepseek_jax as ds
from deepseek_jax import plan
from deepseek_jax.pipeline import chunk_orders as schedules
from deepseek_jax.pipeline.simulate import Durations, simulate
from deepseek_jax.plan import hardware, pictures, tables

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
TINY = 'experiments/configs/v3_tiny.py'


@functools.cache
def v3() -> plan.Report:
  config = ds.changed(
    ds.presets.v3(), {'compute.dtype': 'bfloat16', 'compute.remat': 'full'}
  )
  return plan.estimate(config, cluster='h800x2048', recipe=plan.v3_recipe())


class Case(parameterized.TestCase):
  def folder(self) -> pathlib.Path:
    return pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))


def launch(*flags, seconds=120):
  return subprocess.run(
    [sys.executable, '-m', 'experiments.plan', *flags],
    capture_output=True,
    text=True,
    cwd=ROOT,
    timeout=seconds,
    env={'COLUMNS': '200', 'PATH': '/usr/bin:/bin', 'JAX_PLATFORMS': 'cpu'},
  )


class ReportTest(parameterized.TestCase):
  def test_v3_fits_2048_h800_only_when_it_recomputes(self):
    report = v3()
    total = {p: sum(m.values()) for p, m in report.memory.items()}
    self.assertTrue(report.fits)
    self.assertEqual(report.device_bytes, total['full'])
    limit = report.cluster.accelerator.memory.value
    self.assertGreater(total['none'], limit)

  def test_bounds_hold_their_parts(self):
    t = v3().time
    self.assertEqual(t.least, t.compute + t.bubble + t.update)
    parts = t.compute + t.bubble + t.update + t.fast + t.slow
    self.assertAlmostEqual(t.most, parts)
    slower = dataclasses.replace(t, slow=100.0)
    self.assertEqual(slower.least, 100.0 + t.update)

  def test_a_share_of_dispatch_and_combine_is_exposed(self):
    report = v3()
    device = report.cluster.accelerator
    moved = {
      (w.purpose, w.link): w.bytes
      for w in report.traffic.wires
      if w.purpose in ('expert dispatch', 'expert combine')
    }
    self.assertLen(moved, 4)
    rate = {'fast': device.fast.value, 'slow': device.slow.value}
    want = sum(sent / rate[link] for (_, link), sent in moved.items())
    self.assertAlmostEqual(report.time.exchange, want, places=9)
    self.assertAlmostEqual(report.time.exposed, 0.77 * want, places=9)
    self.assertLess(report.time.exchange, report.time.fast + report.time.slow)
    hidden = dataclasses.replace(report.recipe, exposed=0.0)
    other = plan.estimate(report.config, cluster='h800x2048', recipe=hidden)
    self.assertEqual(other.time.exposed, 0)
    self.assertEqual(other.time.most, report.time.most)
    with self.assertRaisesRegex(ds.InputError, 'exposed = 1.1: must lie in'):
      plan.Recipe(exposed=1.1)

  def test_the_exposed_share_is_that_of_the_compiled_schedules(self):
    text = (ROOT / 'benchmarks/results/schedule.json').read_text()
    most = max(kind['exposed_share'] for kind in json.loads(text).values())
    self.assertBetween(plan.Recipe().exposed, most, most + 0.01)

  def test_compute_is_executed_flops_over_the_clusters_peak(self):
    report = v3()
    count = plan.count_flops(report.config, 4096, mtp=True)
    forward = sum(count.forward.values())
    want = 15360 * count.executed / (2048 * 989.5e12)
    self.assertAlmostEqual(report.time.compute, want)
    # A device's chunk is one sequence through a 16th of the blocks.
    chunk = forward / 16 / 989.5e12
    again = sum(count.repeated.values()) / 16 / 989.5e12
    bubble = 7 * (3 * chunk + again + 2 * chunk + again - 3 * chunk)
    self.assertAlmostEqual(report.time.bubble, bubble)

  def test_an_update_reads_and_writes_the_state_once(self):
    held = v3().memory['full']
    state = sum(held[k] for k in list(held)[:4])
    self.assertAlmostEqual(v3().time.update, 2 * state / 3.35e12)

  def test_checkpoint_against_the_grace_period(self):
    report = v3()
    count = report.parameters
    buffers = 59 * 256
    trained = count.total + count.mtp - buffers
    self.assertEqual(report.checkpoint.bytes, 8 * trained + 4 * buffers)
    self.assertAlmostEqual(
      report.checkpoint.seconds, report.checkpoint.bytes / (256 * 2e9)
    )
    self.assertTrue(report.checkpoint.in_time)
    hurried = dataclasses.replace(report.recipe, grace=5.0)
    report = plan.estimate(
      report.config, cluster=report.cluster, recipe=hurried
    )
    self.assertFalse(report.checkpoint.in_time)

  def test_no_run_costs_less_than_is_possible(self):
    config = v3().config
    self.assertEqual(v3().warnings, ())
    self.assertEqual(v3().time.costed, v3().time.planned)
    hopeful = plan.estimate(
      config, cluster='h800x2048', recipe=plan.v3_recipe(0.99)
    )
    t = hopeful.time
    self.assertLess(t.planned, t.least)
    self.assertAlmostEqual(
      hopeful.cost.device_hours / v3().cost.device_hours,
      t.least / v3().time.planned,
    )
    derived = hopeful.to_dict()['derived']
    self.assertEqual(derived['step_costed'], t.least)
    console = Console(width=200, file=io.StringIO())
    console.print(tables.render({'hopeful': hopeful}))
    (line,) = derived['warnings']
    for text in (f'WARNING: hopeful: {line}', '99.0%: below the least'):
      self.assertIn(text, console.file.getvalue())

  @parameterized.parameters(('v32', 1), ('v3', 0), ('v4_flash', 1))
  def test_a_plan_says_what_it_does_not_count(self, name, warnings):
    recipe = plan.Recipe(mesh=plan.Mesh(tensor=8), utilization=0.1)
    report = plan.estimate(
      getattr(ds.presets, name)(), cluster='h100x8', recipe=recipe
    )
    self.assertLen(report.warnings, warnings)
    for warning in report.warnings:
      self.assertRegex(warning, r'mesh\.tensor = 8: .* are not counted')

  @parameterized.parameters(('v5px8960', 2240), ('910cx384', 48), ('h100x8', 1))
  def test_every_host_writes_its_part(self, cluster, hosts):
    devices = plan.cluster(cluster).devices
    recipe = plan.Recipe(batch=devices, mesh=plan.Mesh(data=devices))
    report = plan.estimate(ds.presets.v3_tiny(), cluster=cluster, recipe=recipe)
    got = report.checkpoint.seconds
    self.assertAlmostEqual(got, report.checkpoint.bytes / (hosts * 2e9))

  def test_json_keeps_exact_integers(self):
    read = json.loads(json.dumps(v3().to_dict()))
    self.assertEqual(read['parameters']['total'], 671_026_419_200)
    self.assertEqual(read['cache']['bf16'], 70_272)
    self.assertEqual(read['config']['attention']['kind'], 'mla')
    self.assertEqual(
      round(read['derived']['gflops_per_token']['half'], 2), 250.45
    )

  def test_assumptions_name_their_sources(self):
    text = '\n'.join(v3().assumptions)
    for word in ('H100 datasheet', '2412.19437', 'remat', 'ZeRO', 'dollars'):
      self.assertIn(word, text)

  def test_the_default_recipe_takes_one_device(self):
    report = plan.estimate(ds.presets.v3_tiny())
    self.assertEqual(report.traffic.wires, ())
    self.assertEqual(report.time.bubble, 0.0)
    self.assertTrue(report.fits)
    self.assertIsNone(report.standard_flops)

  @parameterized.parameters(
    ({'batch': 1000}, 'batch = 1000: must be a multiple'),
    ({'mesh': plan.Mesh(data=4)}, 'mesh of 4 devices'),
    ({'batch': 128 * 31}, 'at least 2'),
    ({'batch': 128 * 33}, '33 micro-batches .* an even number.* to 4352'),
    ({'utilization': 1.2}, 'utilization = 1.2'),
    ({'tokens': 0.0}, 'tokens = 0.0'),
    ({'grace': 0.0}, 'grace = 0.0'),
    ({'tokens': math.inf}, 'tokens = inf: must be finite'),
    ({'tokens': math.nan}, 'tokens = nan'),
    ({'dollars': math.nan}, 'dollars = nan'),
    ({'dollars': math.inf}, 'dollars = inf'),
    ({'storage': math.inf}, 'storage = inf'),
    ({'grace': math.nan}, 'grace = nan'),
    ({'utilization': math.nan}, 'utilization = nan'),
    ({'tokens': 1e308, 'dollars': 1e308}, 'tokens = 1e[+]308: must be finite'),
    ({'utilization': 1e-320}, 'the cost is no finite number'),
    ({'storage': 1e-310}, 'storage = 1e-310'),
    ({'cache_length': 0}, 'cache_length = 0'),
  )
  def test_a_wrong_field_is_named(self, changes, message):
    with self.assertRaisesRegex(ds.InputError, message):
      recipe = dataclasses.replace(plan.v3_recipe(), **changes)
      plan.estimate(ds.presets.v3(), cluster='h800x2048', recipe=recipe)


class HardwareTest(parameterized.TestCase):
  @parameterized.parameters(
    ('h800x2048', 'h800', 2048),
    ('v5px8', 'v5p', 8),
    ('910cx384', '910c', 384),
    ('B200', 'b200', 1),
  )
  def test_names(self, text, name, devices):
    got = plan.cluster(text)
    self.assertEqual((got.accelerator.name, got.devices), (name, devices))

  @parameterized.parameters(
    'a100x8',
    'h100x0',
    'h100 x 8',
    '',
    'x8',
    f'h100x{10**7}',
    f'h100x{"9" * 5000}',
  )
  def test_unknown_names_are_refused(self, text):
    with self.assertRaisesRegex(ds.InputError, 'h800x2048'):
      plan.cluster(text)

  @parameterized.parameters(*hardware.ACCELERATORS)
  def test_every_figure_has_a_source(self, name):
    device = plan.ACCELERATORS[name]
    for field in dataclasses.fields(device)[1:]:
      figure = getattr(device, field.name)
      if figure is not None:
        self.assertGreater(figure.value, 0)
        self.assertGreater(len(figure.source), 10)
    self.assertLess(device.slow.value, device.fast.value)
    self.assertLess(device.fast.value, device.memory_bandwidth.value)

  @parameterized.parameters(*hardware.ACCELERATORS)
  def test_only_vendors_documents_go_unflagged(self, name):
    device = plan.ACCELERATORS[name]
    for field in dataclasses.fields(device)[1:]:
      figure = getattr(device, field.name)
      if figure is None:
        continue
      own = r'NVIDIA|NVLink 4|H100 datasheet, SXM, |docs\.cloud\.google\.com'
      if figure.vendor:
        self.assertRegex(figure.source, own)
        self.assertEqual(figure.origin, figure.source)
      else:
        self.assertEndsWith(figure.origin, 'UNVERIFIED')

  @parameterized.parameters(('h800', 6), ('h100', 2), ('v5p', 0), ('910c', 6))
  def test_a_plan_prints_the_flags(self, name, flags):
    report = plan.estimate(ds.presets.v3_tiny(), cluster=name)
    text = '\n'.join(report.assumptions)
    self.assertEqual(text.count('UNVERIFIED'), flags)
    self.assertIn(report.cluster.accelerator.slow.origin, text)


class ShownTest(Case):
  def test_tables_side_by_side(self):
    tiny = plan.estimate(ds.presets.v3_tiny())
    console = Console(width=200, file=io.StringIO())
    console.print(tables.render({'large': v3(), 'small': tiny}))
    text = console.file.getvalue()
    for word in ('671,026,419,200', '70,272', 'small', 'fits', '250.450 G'):
      self.assertIn(word, text)

  @parameterized.parameters('v3', 'v4_flash', 'llama31_8b')
  def test_bars_of_flops_leave_no_part_out(self, name):
    from matplotlib.figure import Figure

    report = (
      v3() if name == 'v3' else plan.estimate(getattr(ds.presets, name)())
    )
    axes = Figure().subplots()
    pictures._flops(axes, report)
    shown = [t.get_text() for t in axes.texts]
    for seen in ('half', 'full'):
      want = report.flops[seen].per_token / 1e9
      self.assertIn(f' {want:.1f} GFLOP', shown)
    used = sum(n > 0 for n in report.flops['half'].forward.values())
    self.assertLen(axes.get_legend().get_texts(), used)

  def test_pictures(self):
    from matplotlib import image

    folder = self.folder()
    pictures.draw_plan(v3(), folder / 'plan.png', 'DeepSeek-V3')
    line = simulate(schedules.dualpipe(4, 10), Durations())
    pictures.draw_timeline(line, folder / 'line.png', 'DualPipe:')
    for name in ('plan.png', 'line.png'):
      pixels = image.imread(folder / name)
      self.assertGreater(pixels.shape[1], 1000)
      self.assertGreater(pixels[..., :3].std(), 0.05)


class LauncherTest(Case):
  def test_two_plans_with_an_override(self):
    folder = self.folder()
    done = launch(
      '--config=v2_lite',
      '--versus=llama31_8b',
      '--cluster=h100x8',
      '--config.model.moe.top_k=4',
      '--config.recipe.mesh.expert=8',
      f'--json={folder}/plan.json',
      f'--picture={folder}/plan.png',
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertIn('15,706,484,224', done.stdout)
    read = json.loads((folder / 'plan.json').read_text())
    ours, theirs = read['v2_lite'], read['llama31_8b']
    self.assertEqual(ours['config']['moe']['top_k'], 4)
    self.assertEqual(ours['recipe']['mesh']['expert'], 8)
    self.assertEqual(theirs['recipe']['mesh']['fsdp'], 8)
    self.assertEqual(theirs['parameters']['total'], 8_030_261_248)
    self.assertTrue((folder / 'plan.png').exists())

  @parameterized.parameters(('--config=' + TINY,), ('--config', TINY))
  def test_a_runs_file_and_its_tokens(self, *flags):
    folder = self.folder()
    done = launch(*flags, f'--json={folder}/plan.json')
    self.assertEqual(done.returncode, 0, done.stderr)
    recipe = json.loads((folder / 'plan.json').read_text())['v3_tiny']['recipe']
    self.assertEqual(recipe['training']['seq_len'], 256)

  @pytest.mark.slow
  def test_a_compiled_step(self):
    done = launch(
      '--config=v3_tiny',
      '--compile=expert=2',
      '--config.data.seq_len=32',
      '--config.train.batch.size=2',
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    for word in ('all-to-all', 'all 4 layers', 'expert 2'):
      self.assertIn(word, done.stdout)

  @parameterized.parameters(
    (('--config=v3',), 'mesh of 2048 devices'),
    (('--config=v3', '--cluster=cray'), "cluster = 'cray'"),
    ((), '--config'),
    (('--config', 'v3_tinny'), '--config=v3_tinny: no such file'),
    (('--config=v3_tiny', '--json=/no/x'), '--json=/no/x: there is no folder'),
    (('--config=v3_tiny', '--picture=/no/x'), '--picture=/no/x: there is no'),
    (('--config=v3_tiny', '--timeline=/'), '--timeline=/: is a folder'),
    (('--config=v3_tiny', '--compile=tensor=3'), 'mesh.tensor = 3'),
    (('--config=v3_tiny', '--compile=fsdp=2,fsdp=4'), 'fsdp is given twice'),
  )
  def test_mistakes_are_one_line_and_status_2(self, flags, message):
    done = launch(*flags)
    self.assertEqual(done.returncode, 2)
    self.assertEqual(done.stdout, '')
    self.assertIn(message, done.stderr)
    self.assertLen(done.stderr.splitlines(), 1)


if __name__ == '__main__':
  absltest.main()
