"""Describes a training run: all of its configuration, in one tree."""

import dataclasses

from deepseek_jax import config as configs
from deepseek_jax import data as datalib
from deepseek_jax.config import at_least
from deepseek_jax.errors import InputError
from deepseek_jax.model.transformer_config import TransformerConfig
from deepseek_jax.parallel.mesh import MeshConfig
from deepseek_jax.rl.chats import ChatConfig
from deepseek_jax.rl.distill import DistillConfig
from deepseek_jax.rl.grpo import GRPOConfig
from deepseek_jax.rl.rollout import RolloutConfig
from deepseek_jax.rl.rollout import check as check_rollouts
from deepseek_jax.rl.sft import SFTConfig
from deepseek_jax.run import integrity
from deepseek_jax.train.config import TrainConfig
from deepseek_jax.train.objective import PretrainingConfig


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
  """Describes validation while training, on some held-out documents.

  Attributes:
    every: steps between validations (0: none).
    at: further steps after which to validate.
    documents: how many at most while training; the end reads all.
    batch: rows at a time.
    stride: tokens between the starts of overlapping windows; None is half.
  """

  every: int = 0
  documents: int = 8
  batch: int = 8
  stride: int | None = None
  at: tuple = ()

  def __post_init__(self) -> None:
    """Raises InputError for a number out of range."""
    at_least(self, 'evaluate.', every=0, documents=1, batch=1, stride=1)
    if not all(type(step) is int and step > 0 for step in self.at):
      raise InputError(
        f'evaluate.at = {self.at}: must be numbers of steps, 1 at least'
      )


@dataclasses.dataclass(frozen=True)
class SafetyConfig:
  """Describes how a run meets faults; changes no trained number.

  It may change whenever a run goes on.

  Attributes:
    verify: of a checkpoint before it is read: 'full' hashes all of it, 'sample'
      compares sizes and hashes some, 'off' trusts it.
    hang_factor: a step that takes this many medians of the steps before ends
      the process with status 79; 0 lets it hang.
    hang_seconds: that a step may take in any case.
    last_steps: how many are written to abort.jsonl when the run gives up.
  """

  verify: str = 'full'
  hang_factor: float = 30.0
  hang_seconds: float = 120.0
  last_steps: int = 20

  def __post_init__(self) -> None:
    """Raises InputError for a number out of range or an unknown `verify`."""
    integrity.check_choice(self.verify)
    at_least(self, 'safety.', hang_factor=0, hang_seconds=0, last_steps=0)


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """Describes one run, whole.

  Attributes:
    model, data, train, evaluate, safety, mesh: see there.
    objective: what is optimised: any dataclass with `build(model)` that returns
      an `Objective`.
    rollouts: data.path is a task, see rl.tasks, whose answers are sampled by
      the weights that learn; None: data are read.
    chat: data.path holds conversations, which are written like this; None: it
      holds text.
    seed: of the initialisation; the data have their own.
    checkpoint_every: steps between checkpoints (0: only at the end).
    keep: checkpoints that stay.
    tensorboard: also write event files.
    wandb: project of Weights & Biases to send scalars to; '': none.
    init_from: folder of a run to take the weights from; '': none.
  """

  model: TransformerConfig
  data: datalib.DataConfig
  train: TrainConfig
  objective: PretrainingConfig | SFTConfig | GRPOConfig | DistillConfig = (
    PretrainingConfig()
  )
  rollouts: RolloutConfig | None = None
  chat: ChatConfig | None = None
  evaluate: EvaluateConfig = EvaluateConfig()
  safety: SafetyConfig = SafetyConfig()
  mesh: MeshConfig = MeshConfig()
  seed: int = 0
  checkpoint_every: int = 0
  keep: int = 2
  tensorboard: bool = False
  wandb: str = ''
  init_from: str = ''

  def __post_init__(self) -> None:
    """Raises InputError for parts that do not fit each other."""
    configs.check_choices(self)
    self._check_numbers()
    self._check_validation()
    if isinstance(self.objective, DistillConfig):
      self._check_distillation()
    elif self.rollouts is not None:
      self._check_rollouts()
    if isinstance(self.objective, SFTConfig) and self.chat is None:
      raise InputError(
        'objective = sft: learns the answers of conversations; set chat, as in'
        " chat = ChatConfig('plain')"
      )
    if self.data.vocab_size > self.model.vocab_size:
      raise InputError(
        f'data.vocab_size = {self.data.vocab_size}: more than'
        f' model.vocab_size = {self.model.vocab_size}; raise the latter'
      )
    blocks = [b for s in self.model.segments() for b in s.blocks]
    measured = [getattr(b.attention, 'measures_recall', False) for b in blocks]
    if self.train.recall_goal and not any(measured):
      raise InputError(
        f'train.recall_goal = {self.train.recall_goal}: no attention of this'
        ' model measures recall, so the run would never reach it; set it to 0'
        " or take sparse attention with recall_queries or stage = 'dense'"
      )

  def _check_rollouts(self) -> None:
    """Raises InputError where rollouts do not fit objective, chat or mesh."""
    if not isinstance(self.objective, GRPOConfig) or self.chat is None:
      raise InputError(
        'rollouts: are learnt from by a GRPO objective, and prompts are written'
        ' by a chat; set objective and chat, or rollouts = None'
      )
    check_rollouts(self.rollouts, self.objective)
    batch = self.train.batch
    if self.rollouts.updates > 1 and batch.at(0) != batch.size:
      raise InputError(
        f'train.batch.size = {batch.size}: begins with {batch.at(0)}, but'
        f' rollouts.updates = {self.rollouts.updates} mini-batches of a round'
        ' have one size; leave the ramp out'
      )
    layers = self.model.in_order()
    if self.objective.keep_routing and not any(l.block.routed for l in layers):
      raise InputError(
        'objective.keep_routing = True: the model has no experts; set it to'
        ' False'
      )
    self._check_sampling()
    rate = self.train.bias_rate
    moves = self.objective.router_bias == 'updated'
    if moves and not rate.first and not rate.last:
      raise InputError(
        "objective.router_bias = 'updated': train.bias_rate is 0, so none would"
        " move; set train.bias_rate.first, or router_bias to 'frozen'"
      )
    if self.rollouts.drafts and not self.model.mtp.depth:
      raise InputError(
        f'rollouts.drafts = {self.rollouts.drafts}: model.mtp.depth = 0, so'
        ' nothing guesses tokens; set it to 0'
      )

  def _check_sampling(self) -> None:
    """Raises InputError where answers can't be sampled on the mesh."""
    mesh = self.mesh
    for axis in ('stage', 'context'):
      if getattr(mesh, axis) > 1:
        raise InputError(
          f'mesh.{axis} = {getattr(mesh, axis)}: answers are sampled a token at'
          f' a time by whole layers; set mesh.{axis} to 1'
        )
    if self.rollouts.slots % mesh.ways('batch'):
      raise InputError(
        f'rollouts.slots = {self.rollouts.slots}: must be a multiple of the'
        f' {mesh.ways("batch")} shards of a batch (mesh: {mesh.spread})'
      )

  def _check_distillation(self) -> None:
    """Raises InputError where distillation does not fit chat or mesh."""
    if self.chat is None:
      raise InputError(
        'objective = distill: learns the answers of conversations, or those to'
        " a task with rollouts; set chat, as in chat = ChatConfig('plain')"
      )
    if self.mesh.stage > 1:
      raise InputError(
        f'mesh.stage = {self.mesh.stage}: teachers have no stages; set'
        ' mesh.stage to 1'
      )
    if self.rollouts is not None:
      self._check_sampling()
    plain = RolloutConfig()
    for name in ('updates', 'epochs', 'top_k', 'drafts', 'reference'):
      asked = getattr(self.rollouts or plain, name)
      if asked != getattr(plain, name):
        raise InputError(
          f'rollouts.{name} = {asked!r}: distillation learns a round once and'
          ' draws from the whole vocabulary or by top_p; leave it out'
        )

  def _check_numbers(self) -> None:
    """Raises InputError for a number or a path that no run can have."""
    at_least(self, keep=1, checkpoint_every=0)
    if '\0' in self.init_from:
      raise InputError(f'init_from = {self.init_from!r}: is no path; name one')
    whole = type(self.seed) is int
    if not whole or not 0 <= self.seed < 2**32:  # JAX takes others for these
      raise InputError(f'seed = {self.seed}: must lie in 0..2**32 - 1')

  def _check_validation(self) -> None:
    """Raises InputError if validation has no document, or too long a stride."""
    evaluate, data = self.evaluate, self.data
    asked = {'every': evaluate.every, 'at': evaluate.at}
    for name, value in asked.items():
      if value and not data.heldout_fraction:
        raise InputError(
          f'evaluate.{name} = {value}: data.heldout_fraction = 0 leaves no'
          f' document to validate on; raise it or leave evaluate.{name} out'
        )
    if evaluate.stride is not None and evaluate.stride > data.seq_len:
      raise InputError(
        f'evaluate.stride = {evaluate.stride}: must be at most data.seq_len ='
        f' {data.seq_len}'
      )

  @property
  def steps(self) -> int:
    """Returns the steps of the run, with the batch ramp."""
    per_sequence, tokens, steps = self.data.seq_len, 0, 0
    batch = self.train.batch
    # Step by step on the ramp; after it all batches have one size.
    while tokens < min(batch.ramp_tokens, self.train.tokens):
      tokens += batch.at(tokens) * per_sequence
      steps += 1
    left = max(self.train.tokens - tokens, 0)
    return steps + int(-(-left // (batch.size * per_sequence)))
