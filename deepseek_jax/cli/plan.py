"""Plans a run: parameters, FLOPs, memory, traffic, time and money.

python -m experiments.plan --config=v3 --cluster=h800x2048
python -m experiments.plan --config=v2 --versus=llama31_70b --cluster=h100x64
python -m experiments.plan --config=experiments/configs/v3_tiny.py \\
  --config.model.moe.top_k=2 --json=plan.json --picture=plan.png
python -m experiments.plan --config=v2_lite --compile=fsdp=8,expert=8

--config takes a preset's name or a file with get_config(). A preset's plan has
the fields `model` and `recipe` (--config.recipe.mesh.expert=64); v3 comes with
its own recipe, the others are spread over all devices. A file's plan is that
of its run: on the run's mesh where it has one, by its rules and its exchange.
Nothing is allocated, and nothing compiled but by --compile: it has XLA
partition the training step for a mesh of that many fake devices, whatever the
run's own sizes, and shows what each would hold and send. --kernels lists which
operations run as kernels on the cluster's GPUs or TPUs, and why others do not;
it takes the mesh of --compile where that is given, else the plan's.
"""

import dataclasses
import json
import math
import pathlib
import sys
from typing import Any

from absl import flags
from rich.console import Console

from deepseek_jax import plan
from deepseek_jax.cli import common, outputs, run_plan
from deepseek_jax.cli.named import PRESETS, RECIPES, PlanConfig
from deepseek_jax.errors import InputError, naming
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.pipeline import chunk_orders as schedules
from deepseek_jax.pipeline.simulate import (
  Durations,
  SimulatedStep,
  simulate,
)
from deepseek_jax.plan import (
  compiled,
  hardware,
  kernel_choices,
  pictures,
  tables,
)
from deepseek_jax.plan.device_shares import AXES
from deepseek_jax.run import fit as loop

_CONFIG = common.define_config()
flags.declare_key_flag('config')
_VERSUS = common.define_config(
  'versus', 'A second configuration, shown beside the first.'
)
_CLUSTER = flags.DEFINE_string('cluster', 'h100', 'NAMExCOUNT: h800x2048.')
_JSON = flags.DEFINE_string('json', None, 'Where the plan goes as JSON.')
_PICTURE = flags.DEFINE_string('picture', None, 'Where its picture goes.')
_TITLE = flags.DEFINE_string('title', None, "The picture's title.")
_TIMELINE = flags.DEFINE_string(
  'timeline', None, "Where a picture of the pipeline's timeline goes."
)

_COMPILE = flags.DEFINE_string(
  'compile',
  None,
  'Compile the training step for a mesh: 8x4x2 (in the order data, fsdp,'
  ' expert, tensor, context) or fsdp=8,expert=4.',
)
_KERNELS = flags.DEFINE_bool(
  'kernels', False, 'List which operations run as kernels, and why others not.'
)


def _name(flag: str, argv: list[str]) -> str:
  """Returns the name of a configuration: its preset, or its file."""
  for arg in argv:
    key, _, value = arg.partition('=')
    if key.lstrip('-') == flag:
      return pathlib.Path(value.rpartition(':')[2]).stem
  return flag


def _read(holder: flags.FlagHolder) -> Any:
  """Returns a configuration or None; InputError where there is no such file."""
  try:
    if holder.value is not None:
      holder.value.keys()  # one that did not load fails when it is used
  except OSError as error:
    raise InputError(f'--{holder.name}: {error}') from None
  return holder.value


def fitted(config: PlanConfig, cluster: plan.Cluster) -> PlanConfig:
  """Spreads a plan that names no mesh over the cluster.

  State is split over as many devices as divide the width (fsdp), the batch
  over all; the batch grows to a sequence per device where it is smaller.
  """
  recipe = config.recipe
  if recipe.mesh.devices > 1 or cluster.devices == 1:
    return config
  fsdp = math.gcd(config.model.dim, cluster.devices)
  mesh = plan.Mesh(data=cluster.devices // fsdp, fsdp=fsdp)
  batch = -(-recipe.batch // cluster.devices) * cluster.devices
  micro = math.gcd(recipe.training.micro_batch, batch // cluster.devices)
  training = dataclasses.replace(recipe.training, micro_batch=micro)
  recipe = dataclasses.replace(
    recipe, mesh=mesh, batch=batch, training=training
  )
  return dataclasses.replace(config, recipe=recipe)


def report(config: Any, cluster: plan.Cluster) -> plan.Report:
  """Returns the plan of an edited configuration, a preset's or a run's."""
  if 'recipe' in config:
    made = fitted(common.frozen(PlanConfig, config), cluster)
    return plan.estimate(made.model, cluster=cluster, recipe=made.recipe)
  run = common.frozen(loop.RunConfig, config)
  run_plan.check(run, cluster)
  made = fitted(run_plan.plan_of(run), cluster)
  out = plan.estimate(
    made.model,
    cluster=cluster,
    recipe=made.recipe,
    rules=run_plan.rules(run.mesh),
  )
  told = out.assumptions + run_plan.differences(run, out)
  asked = run_plan.round_of(run)
  if asked is None:
    return dataclasses.replace(out, assumptions=told)
  return dataclasses.replace(
    out,
    rollouts=plan.rollout_cost(out, asked),
    assumptions=told + run_plan.SAMPLED,
  )


def program(made: plan.Report, text: str, config: Any) -> compiled.Program:
  """Returns the training step of a plan on the mesh that --compile names.

  Args:
    made: the plan.
    text: the mesh's sizes, all of them.
    config: what was planned; a run's has rules and exchange of its own.
  """
  grid = MeshConfig()
  if 'recipe' not in config:
    grid = common.frozen(loop.RunConfig, config).mesh
  run, asked = made.recipe.training, compiled.parse_mesh(text)
  return compiled.Program(
    made.config,
    dataclasses.replace(asked, rules=grid.rules, exchange=grid.exchange),
    run.seq_len,
    run.micro_batch,
    run.optimizer,
  )


def kernels(
  made: plan.Report, asked: compiled.Program | None, config: Any
) -> tuple[compiled.Program, list[kernel_choices.Chosen]]:
  """Returns what --kernels lists, and for which program.

  Args:
    made: the plan.
    asked: the program of --compile, or None.
    config: what was planned.
  """
  device = kernel_choices.capability(made.cluster.accelerator.name)
  if asked is None:
    grid, sizes = made.recipe.mesh, {}
    for axis in AXES:
      sizes[axis] = getattr(grid, axis)
    mesh = kernel_choices.small(MeshConfig(**sizes))
    text = ','.join(f'{a}={getattr(mesh, a)}' for a in AXES if a != 'stage')
    asked = program(made, text, config)
    compiled.check(asked)
  return asked, kernel_choices.kernel_choices(asked, device)


def timeline(made: plan.Report) -> SimulatedStep:
  """Simulates one training step of a plan's pipeline, in units of F."""
  run, grid = made.recipe.training, made.recipe.mesh
  makers = {'1f1b': schedules.one_f_one_b, 'dualpipe': schedules.dualpipe}
  if grid.stage == 1 or run.schedule not in makers:
    raise InputError(
      f'--timeline: needs recipe.mesh.stage > 1 and a schedule of'
      f' {list(makers)}; got {grid.stage}, {run.schedule!r}'
    )
  micro = made.recipe.batch // (grid.batch * run.micro_batch)
  shown = min(micro, 2 * grid.stage + 4)  # more of them repeat the middle
  schedule = makers[run.schedule](grid.stage, shown)
  return simulate(schedule, Durations())


def _check_paths() -> None:
  """Raises InputError for files that cannot be written, before the work."""
  for holder, what, is_ours in (
    (_JSON, 'a plan', outputs.is_json_of('config', 'derived')),
    (_PICTURE, 'a picture of Matplotlib', outputs.is_picture),
    (_TIMELINE, 'a picture of Matplotlib', outputs.is_picture),
  ):
    if holder.value:
      outputs.check(holder.name, holder.value, what, is_ours)


def main(argv: list[str]) -> None:
  """Prints the tables of a plan and writes the files that flags name."""
  del argv
  if _read(_CONFIG) is None:
    raise InputError(
      f'give --config=FILE, or --config=NAME of'
      f' {", ".join(dict.fromkeys(RECIPES + PRESETS))}'
    )
  _check_paths()
  cluster = hardware.cluster(_CLUSTER.value)
  first = _name('config', sys.argv)
  reports = {first: report(_CONFIG.value, cluster)}
  if _read(_VERSUS) is not None:
    other = _name('versus', sys.argv)
    if other in reports:
      other += ' (versus)'
    reports[other] = report(_VERSUS.value, cluster)
  asked = None
  if _COMPILE.value:
    asked = program(reports[first], _COMPILE.value, _CONFIG.value)
    compiled.check(asked)
  Console().print(tables.render(reports))
  if asked:
    out = compiled.compile_step(asked)
    Console().print(tables.render_compiled(first, asked, out))
  if _KERNELS.value:
    found = kernels(reports[first], asked, _CONFIG.value)
    Console().print(tables.render_kernels(first, *found))
  if _JSON.value:
    out = {name: made.to_dict() for name, made in reports.items()}
    with naming(_JSON.value):
      pathlib.Path(_JSON.value).write_text(json.dumps(out, indent=2) + '\n')
  if _PICTURE.value:
    pictures.draw_plan(reports[first], _PICTURE.value, _TITLE.value or first)
  if _TIMELINE.value:
    made = timeline(reports[first])
    title = f'{_TITLE.value or first}:'
    pictures.draw_timeline(made, _TIMELINE.value, title)


def run() -> None:
  """Runs the launcher as a program."""
  common.launch(main, names='plan')
