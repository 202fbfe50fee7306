"""Computes distillation losses over the whole vocabulary, in chunks.

Teachers come as their last hidden states and their heads, which are applied
here, as in V4's on-policy distillation: a hidden state is far smaller than a
row of logits. Prefixes are data, whoever sampled them: no gradient goes through
sampling.
Legend: B rows, T tokens, N tokens of a device, D model, E teachers' width,
V vocabulary, K teachers.
"""

import dataclasses
from collections.abc import Mapping
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

  def of_chunk(part: tuple, head: jax.Array, heads: jax.Array) -> jax.Array:
    h, state, which, weights = part
    soft = lambda logits: jax.nn.log_softmax(logits / temperature)
    student = soft(float32_logits(h, head))
    teacher = soft(_teacher_logits(state, which, heads))
    value = divergence(student, jax.lax.stop_gradient(teacher), beta)
    # A token that does not count may hold anything.
    return jnp.where(weights != 0, value * weights, 0.0).sum()

  def of_device(*arrays: Any) -> jax.Array:
    *tokens, (head, heads) = arrays
    return each(of_chunk, split_tokens(chunk, *tokens), (head, heads)).sum()

  which = jnp.broadcast_to(taught.which[:, None], weights.shape)
  tokens = hidden, taught.hidden, which, weights
  return per_device.token_sum(of_device, tokens, (head, taught.heads))


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
    hidden: [B T E] last hidden states, after each teacher's final norm.
    which: [B] int32, the teacher of each row.
    heads: [K E V].
  """

  def __init__(
    self,
    hidden: jax.Array,
    heads: jax.Array,
    which: jax.Array | None = None,
  ):
    """Takes one teacher for all rows unless `which` names each row's."""
    self.hidden, self.heads = map(jax.lax.stop_gradient, (hidden, heads))
    rows = hidden.shape[0]
    self.which = jnp.zeros(rows, jnp.int32) if which is None else which


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

  On samples of the student it is on-policy; R1's is supervised fine-tuning on
  samples of the teacher, see SFTConfig.

  Attributes:
    beta: see `divergence`; 1 is V4's on-policy distillation.
    temperature: of both distributions.
    rescale: multiplies by temperature squared, so that gradients keep their
      size (arXiv:1503.02531, section 2).
  """

  beta: float = 1.0
  temperature: float = 1.0
  rescale: bool = True

  def __post_init__(self) -> None:
    """Raises InputError for a number out of range."""
    within(self, beta=(0, 1))
    above(self, temperature=0)

  def towards(self, heads: np.ndarray | jax.Array) -> 'Distillation':
    """Returns the configuration with its teachers' heads [K E V]."""
    return Distillation(self, heads)


@dataclasses.dataclass(frozen=True, eq=False)
class Distillation:
  """Describes distillation with the heads of its teachers.

  The batch has 'trained' [B T+1], 'teacher_hidden' [B T+1 E] and, of several
  teachers, 'teacher' [B] int32, its number.
  """

  config: DistillConfig
  heads: Any  # [K E V]

  def build(self, model: Any) -> Objective:
    """Returns the objective; InputError for another vocabulary."""
    vocab = self.heads.shape[-1]
    if model is not None and model.config.vocab_size != vocab:
      raise InputError(
        f'the teacher has a vocabulary of {vocab} tokens, the student of'
        f' {model.config.vocab_size}: they must be the same'
      )
    return Objective(self._loss, _inputs, mtp=False, metrics=METRICS)

  def _loss(
    self, predictions: Predictions, inputs: Inputs, shares: Shares
  ) -> tuple[jax.Array, dict]:
    """Returns a micro-batch's share of the loss."""
    cfg, batch = self.config, inputs.batch
    which = batch.get('teacher')
    if which is None and len(self.heads) > 1:
      raise InputError(
        f"batch has no 'teacher' [B], which of the {len(self.heads)} a row has"
      )
    # The state at a token predicts the next one, as the student's does.
    taught = Taught(
      batch['teacher_hidden'][:, :-1], jnp.asarray(self.heads), which
    )
    total = divergence_sum(
      predictions.hidden,
      predictions.head,
      taught,
      inputs.weights,
      beta=cfg.beta,
      temperature=cfg.temperature,
    )
    if cfg.rescale:
      total *= cfg.temperature**2
    return total / shares.denominator, {}


def _inputs(batch: Mapping[str, jax.Array]) -> Inputs:
  """Returns the inputs of a batch; InputError without a teacher's states."""
  if 'teacher_hidden' not in batch:
    raise InputError(
      "batch has no 'teacher_hidden' [B T+1 E], the teacher's last hidden"
      ' states of its tokens'
    )
  return answers(batch)


def sampled_advantages(student: np.ndarray, teacher: np.ndarray) -> np.ndarray:
  """Returns the advantages of sampled tokens that teach the reverse KL.

  The policy gradient with them has the gradient of KL(student || teacher) as
  its expectation, at a higher variance than the sum over the vocabulary.

  Args:
    student, teacher: log-probs [...] of the tokens, the student's at rollout.
  """
  return np.asarray(teacher) - np.asarray(student)
