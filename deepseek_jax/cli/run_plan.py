"""Plans a training run: on its own mesh, by its rules and its exchange.

A run without a mesh is left to be spread over the cluster.
"""

from deepseek_jax import plan
from deepseek_jax.cli.named import PlanConfig
from deepseek_jax.errors import InputError
from deepseek_jax.model.transformer import build
from deepseek_jax.parallel import mesh as meshes
from deepseek_jax.parallel.mesh import MeshConfig, names
from deepseek_jax.plan.device_shares import AXES
from deepseek_jax.run import fit as loop
from deepseek_jax.run import staged_steps as staged

# How plans take a batch [rows, tokens] to be sharded.
_CUT = {'batch': ('data', 'fsdp', 'expert'), 'seq': ('context',)}


def check(run: loop.RunConfig, cluster: plan.Cluster) -> None:
  """Raises InputError where training would, or where a plan would mislead."""
  grid, batch = run.mesh, run.train.batch
  meshes.check(grid, build(run.model).abstract)
  if grid.devices == 1:
    return
  if grid.devices != cluster.devices:
    raise InputError(
      f'mesh: {grid.spread} makes {grid.devices} devices, but the cluster has'
      f' {cluster.devices}; give'
      f' --cluster={cluster.accelerator.name}x{grid.devices}, or sizes that'
      f' make up {cluster.devices}'
    )
  for name, axes in _CUT.items():
    over = grid.rules.get(name)
    differ = set(names(over)) ^ set(axes)
    if any(getattr(grid, axis) > 1 for axis in differ):
      raise InputError(
        f'mesh.rules.{name} = {over!r}: plans know it sharded over'
        f' {", ".join(axes)} only; set it to {axes}, or the sizes of'
        f' {", ".join(sorted(differ))} to 1'
      )
  meshes.check_batch(grid, batch.size, run.data.seq_len, batch.accumulate)
  grid.exchange.check(grid.ways('experts'), run.model.dim)
  if grid.stage > 1:
    staged.schedule(grid, batch.accumulate)


def _sent(run: loop.RunConfig, dtype: str) -> str:
  """Returns the dtype that rows travel in."""
  return run.model.compute.products if dtype == 'compute' else dtype


def plan_of(run: loop.RunConfig) -> PlanConfig:
  """Returns the plan of a run; a batch passes as its micro-batches do."""
  batch, grid = run.train.batch, run.mesh
  training = plan.Training(
    seq_len=run.data.seq_len,
    micro_batch=max(batch.size // (batch.accumulate * grid.ways('batch')), 1),
    optimizer=run.train.optimizer,
    dispatch=_sent(run, grid.exchange.dispatch),
    schedule=grid.schedule,
  )
  recipe = plan.Recipe(
    tokens=run.train.tokens,
    batch=batch.size,
    training=training,
    mesh=plan.Mesh(**{axis: getattr(grid, axis) for axis in AXES}),
    node_limited=grid.exchange.kind == 'two_hop',
  )
  return PlanConfig(run.model, recipe)


# What a plan of rollouts assumes.
SAMPLED = (
  'answers are as long as rollouts.most, prompts fill the rest of'
  ' data.seq_len; while they are sampled the weights lie as in training and'
  ' are read once for every token of those decoded together',
  'verifiers and the transfer of weights to the engine take no time',
)


def round_of(run: loop.RunConfig) -> plan.RoundPlan | None:
  """Returns the round of a run over rollouts; None of one over text."""
  cfg = run.rollouts
  if cfg is None:
    return None
  return plan.RoundPlan(
    answers=cfg.prompts * cfg.group,
    together=cfg.slots,
    prompt=max(run.data.seq_len + 1 - cfg.most, 1),
    answer=cfg.most,
    updates=cfg.steps,
    passes=(cfg.steps > 1) + (run.objective.kl != 'none'),
    rounds=-(-run.steps // cfg.steps),
    reference=run.objective.kl != 'none',
  )


def rules(grid: MeshConfig) -> dict[str, tuple[str, ...]]:
  """Returns the rules of a run as plans read them: axis -> mesh axes."""
  return {name: names(over) for name, over in grid.rules.items()}


def differences(run: loop.RunConfig, made: plan.Report) -> tuple[str, ...]:
  """Returns a sentence for each way in which the plan departs from the run."""
  out, exchange = [], run.mesh.exchange
  if rules(run.mesh) != rules(MeshConfig()):
    out.append('activations are sharded and sent as by the default mesh.rules')
  expert, node = made.recipe.mesh.expert, made.cluster.accelerator.node
  if expert == 1:
    return tuple(out)
  back = _sent(run, exchange.combine)
  if back != 'bfloat16':
    out.append(
      f"results of experts are combined in bfloat16; the run's in {back}"
    )
  if exchange.kind == 'all_gather':
    out.append(
      'tokens travel to their experts alone; the run (mesh.exchange.kind ='
      ' all_gather) sends all to every device of the expert axis'
    )
  nodes = -(-expert // int(node.value))
  if exchange.kind == 'two_hop' and exchange.nodes != nodes:
    out.append(
      f'the expert axis spans {nodes} nodes of the cluster; the run says'
      f' mesh.exchange.nodes = {exchange.nodes}'
    )
  return tuple(out)
