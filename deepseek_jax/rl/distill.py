"""Computes distillation losses over the whole vocabulary, in chunks.

Teachers come as their last hidden states and their heads, which are applied
here, as in V4's on-policy distillation: a hidden state is far smaller than a
row of logits. Prefixes are data, whoever sampled them: no gradient goes through
sampling.
A row has one teacher, or all of them with weights, as in V4's sum over teachers
of w_k KL(student || teacher_k).
Legend: B rows, T tokens, N tokens of a chunk, D model, E teachers' width,
V vocabulary, K teachers.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.config import above, within
from deepseek_jax.errors import InputError
from deepseek_jax.model.attention.query_blocks import each
from deepseek_jax.parallel import per_device
from deepseek_jax.record.metric import Metric
from deepseek_jax.rl.sft import answers
from deepseek_jax.train.cross_entropy import float32_logits, split_tokens
from deepseek_jax.train.objective import Inputs, Objective, Predictions, Shares

METRICS = {'loss': Metric('Divergence from the teacher', 'nats per token')}
HEADS = 'teacher_heads'  # in a batch: of no row, so micro-batches share it
_NEEDED = {
  'teacher_hidden': "[B T+1 ... E], the teachers' last hidden states",
  HEADS: '[K E V], their heads',
}


def divergence(
  student: jax.Array, teacher: jax.Array, beta: float
) -> jax.Array:
  """Returns the divergence [...] of two distributions; >= 0, 0 if equal.

  Args:
    student, teacher: log-probs [... V].
    beta: 0 is KL(teacher || student), 1 is KL(student || teacher). Between,
      the generalised Jensen-Shannon divergence (arXiv:2306.13649, eq. 1):
      beta KL(teacher || m) + (1 - beta) KL(student || m) with the mixture
      m = beta teacher + (1 - beta) student.
  """
  kl = lambda p, q: (jnp.exp(p) * (p - q)).sum(axis=-1)
  if beta == 0:
    return kl(teacher, student)
  if beta == 1:
    return kl(student, teacher)
  mixture = jnp.logaddexp(
    student + float(np.log1p(-beta)),
    teacher + float(np.log(beta)),
  )
  return beta * kl(teacher, mixture) + (1 - beta) * kl(student, mixture)


def divergence_sum(
  hidden: jax.Array,
  head: jax.Array,
  taught: 'Taught',
  weights: jax.Array,
  *,
  beta: float,
  temperature: float = 1.0,
  chunk: int = 1024,
) -> jax.Array:
  """Returns the weighted sum of the divergences, a float32 scalar.

  Logits of student and teacher exist for `chunk` tokens at a time, forwards and
  backwards. Differentiable in hidden and head alone.

  Args:
    hidden: [B T D]; head: [D V].
    taught: what the teachers say of the same tokens.
    weights: [B T].
    beta: see `divergence`.
    temperature: divides both models' logits.
    chunk: tokens at a time, at most; of each device.
  """
  soft = lambda logits: jax.nn.log_softmax(logits / temperature)

  def of_chunk(part: tuple, head: jax.Array, heads: jax.Array) -> jax.Array:
    h, state, which, weights = part
    student = soft(float32_logits(h, head))
    if taught.shares is None:
      teacher = soft(_teacher_logits(state, which, heads))
      value = divergence(student, jax.lax.stop_gradient(teacher), beta)
    else:
      value = _shared(student, state, heads, taught.shares, soft, beta)
    # A token that does not count may hold anything.
    return jnp.where(weights != 0, value * weights, 0.0).sum()

  def of_device(*arrays: Any) -> jax.Array:
    *tokens, (head, heads) = arrays
    return each(of_chunk, split_tokens(chunk, *tokens), (head, heads)).sum()

  which = jnp.broadcast_to(taught.which[:, None], weights.shape)
  tokens = hidden, taught.hidden, which, weights
  return per_device.token_sum(of_device, tokens, (head, taught.heads))


def _shared(
  student: jax.Array,
  states: jax.Array,
  heads: jax.Array,
  shares: tuple[float, ...],
  soft: Callable[[jax.Array], jax.Array],
  beta: float,
) -> jax.Array:
  """Returns [N]: the sum of the divergences from all teachers, by their shares.

  The logits of one teacher exist at a time, forwards and backwards.

  Args:
    student: log-probs [N V].
    states: [N K E]; heads: [K E V].
    shares: one of each teacher.
    soft: makes log-probs of logits.
    beta: see `divergence`.
  """

  @jax.checkpoint
  def one(
    total: jax.Array, taught: tuple[jax.Array, jax.Array, jax.Array]
  ) -> tuple[jax.Array, None]:
    state, head, share = taught
    teacher = jax.lax.stop_gradient(soft(float32_logits(state, head)))
    return total + share * divergence(student, teacher, beta), None

  parts = jnp.asarray(shares, student.dtype)
  start = jnp.zeros(len(student), student.dtype)
  return jax.lax.scan(one, start, (states.swapaxes(0, 1), heads, parts))[0]


def _teacher_logits(
  hidden: jax.Array, which: jax.Array, heads: jax.Array
) -> jax.Array:
  """Returns [N V]: each token's logits by the head of its own teacher.

  Rows are best sorted by teacher: then most chunks use one head.
  """
  K, _, V = heads.shape
  if K == 1:
    return float32_logits(hidden, heads[0])

  def one(logits: jax.Array, numbered: tuple) -> tuple[jax.Array, None]:
    number, head = numbered
    own = which == number
    made = lambda: jnp.where(own[:, None], float32_logits(hidden, head), logits)
    return jax.lax.cond(own.any(), made, lambda: logits), None

  start = jnp.zeros((len(hidden), V), jnp.float32)
  return jax.lax.scan(one, start, (jnp.arange(K), heads))[0]


class Taught:
  """Holds what teachers say of a batch's tokens.

  Attributes:
    hidden: last hidden states, after each teacher's final norm: [B T E] of the
      row's own teacher, or [B T K E] of all.
    heads: [K E V].
    which: [B] int32, the teacher of each row, where it has one.
    shares: of each teacher's divergence in a token's, where it has all.
  """

  def __init__(
    self,
    hidden: jax.Array,
    heads: jax.Array,
    which: jax.Array | None = None,
    shares: Sequence[float] | None = None,
  ):
    """Takes one teacher for all rows unless `which` or `shares` says more."""
    self.hidden, self.heads = map(jax.lax.stop_gradient, (hidden, heads))
    rows = hidden.shape[0]
    self.which = jnp.zeros(rows, jnp.int32) if which is None else which
    self.shares = None if shares is None else tuple(map(float, shares))


def stacked(heads: list[np.ndarray]) -> np.ndarray:
  """Returns heads [E V] of several widths as one array [K E V].

  Narrower ones get rows of zeros; so must their hidden states.

  Raises:
    InputError: vocabularies differ.
  """
  sizes = {head.shape[1] for head in heads}
  if len(sizes) != 1:
    raise InputError(
      f'teachers have vocabularies of {sorted(sizes)} tokens: they must have'
      ' that of the student'
    )
  widest = max(head.shape[0] for head in heads)
  pad = lambda a: np.pad(a, ((0, widest - a.shape[0]), (0, 0)))
  return np.stack([pad(np.asarray(head)) for head in heads])


@dataclasses.dataclass(frozen=True)
class DistillConfig:
  """Describes distillation towards teachers' distributions.

  On samples of the student (`rollouts`) it is on-policy; R1's is supervised
  fine-tuning on samples of the teacher, see SFTConfig. The batch has 'trained'
  [B T+1], 'teacher_heads' [K E V] and 'teacher_hidden': [B T+1 K E], or [B T+1
  E] with 'teacher' [B] int32, the number of a row's own, unless there is one.

  Attributes:
    beta: see `divergence`; 1 is V4's on-policy distillation.
    temperature: of both distributions.
    rescale: multiplies by temperature squared, so that gradients keep their
      size (arXiv:1503.02531, section 2).
    teachers: folder -> weight of its divergence in the sum: runs, Hugging Face
      folders or converted ones, of the student's vocabulary. Weights are
      divided by their sum.
  """

  beta: float = 1.0
  temperature: float = 1.0
  rescale: bool = True
  teachers: dict[str, float] | None = None

  def __post_init__(self) -> None:
    """Raises InputError for a number out of range, or no teacher."""
    within(self, beta=(0, 1))
    above(self, temperature=0)
    if self.teachers is not None:
      self._check_teachers()

  def _check_teachers(self) -> None:
    """Raises InputError for teachers that are no folders with weights."""
    number = lambda w: isinstance(w, int | float) and not isinstance(w, bool)
    good = isinstance(self.teachers, Mapping) and [
      isinstance(folder, str) and folder and number(w) and 0 < w < math.inf
      for folder, w in self.teachers.items()
    ]
    if not good or not all(good):
      raise InputError(
        f'objective.teachers = {self.teachers!r}: must be a dict of folders and'
        " weights above 0, as {'runs/teacher': 1.0}"
      )

  @property
  def shares(self) -> tuple[float, ...]:
    """Returns the share of each teacher; they sum to 1."""
    weights = tuple((self.teachers or {'': 1.0}).values())
    return tuple(weight / sum(weights) for weight in weights)

  def build(self, model: Any) -> Objective:
    """Returns the objective; it asks nothing of the model."""
    del model
    return Objective(
      self._loss, _inputs, mtp=False, metrics=METRICS, shared=(HEADS,)
    )

  def _loss(
    self, predictions: Predictions, inputs: Inputs, shares: Shares
  ) -> tuple[jax.Array, dict]:
    """Returns a micro-batch's share of the loss."""
    total = divergence_sum(
      predictions.hidden,
      predictions.head,
      self._taught(inputs.batch, predictions.head.shape[1]),
      inputs.weights,
      beta=self.beta,
      temperature=self.temperature,
    )
    if self.rescale:
      total *= self.temperature**2
    return total / shares.denominator, {}

  def _taught(self, batch: Mapping[str, jax.Array], vocab: int) -> Taught:
    """Returns what a batch says of the teachers; InputError if it can't be."""
    heads, which = batch[HEADS], batch.get('teacher')
    if heads.shape[2] != vocab:
      raise InputError(
        f'the teacher has a vocabulary of {heads.shape[2]} tokens, the student'
        f' of {vocab}: they must be the same'
      )
    # The state at a token predicts the next one, as the student's does.
    hidden = batch['teacher_hidden'][:, :-1]
    if hidden.ndim == 3:
      if which is None and len(heads) > 1:
        raise InputError(
          f"batch has no 'teacher' [B], which of the {len(heads)} a row has"
        )
      return Taught(hidden, heads, which)
    if len({hidden.shape[2], len(heads), len(self.shares)}) > 1:
      raise InputError(
        f'batch has the states of {hidden.shape[2]} teachers and'
        f' {len(heads)} heads, objective.teachers {len(self.shares)}'
      )
    return Taught(hidden, heads, shares=self.shares)


def _inputs(batch: Mapping[str, jax.Array]) -> Inputs:
  """Returns the inputs of a batch; InputError without a teacher's states."""
  for name, what in _NEEDED.items():
    if name not in batch:
      raise InputError(f'batch has no {name!r} {what}')
  return answers(batch)


def sampled_advantages(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
  """Returns the advantages of sampled tokens that teach the reverse KL.

  The policy gradient with them has the gradient of KL(student || teacher) as
  its expectation, at a higher variance than the sum over the vocabulary.

  Args:
    student, teacher: log-probs [...] of the tokens, the student's at rollout.
  """
  return np.asarray(teacher) - np.asarray(student)
