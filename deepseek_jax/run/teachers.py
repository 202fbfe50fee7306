"""Adds to batches what teachers say of their tokens, for distillation.

On a file of conversations, or on answers that the student samples itself.
Teachers are read once and stay in memory, laid on the student's mesh by its
rules; all processes ask of the whole batch. Of their logits none is kept: the
objective makes them of hidden states, a chunk at a time.
Legend: B rows, T tokens, K teachers, E width of the widest, V vocabulary.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from deepseek_jax.data import packing
from deepseek_jax.errors import InputError
from deepseek_jax.model.transformer import Model, build
from deepseek_jax.parallel import placement, processor
from deepseek_jax.rl import distill
from deepseek_jax.rl.answering import AnswerConfig, Answering, Asked, Scored
from deepseek_jax.rl.conversation_store import ConversationStore, PackedBatches
from deepseek_jax.run import opening, rl
from deepseek_jax.run.config import RunConfig
from deepseek_jax.train.objective import next_token

_STREAM = 'teachers_sha256'


class _Teacher:
  """Holds a teacher, and where it lies."""

  def __init__(self, opened: opening.Opened, where: placement.Placement):
    """Takes its weights as they were read; `place` lays them out."""
    self.model, self.variables = opened.model, opened.variables
    self.sha256, self.where = opened.sha256, where
    self._run = _hidden(self.model, where.copied)

  def place(self) -> None:
    """Lays the weights on the mesh; every process must ask."""
    self.variables = self.where.put(self.variables, self.model.abstract)

  def states(self, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the last hidden states [B T E] of a batch, float32."""
    with self.where.use():
      return np.asarray(self._run(self.variables, batch), np.float32)


class Teachers:
  """Holds the teachers of a run.

  Attributes:
    heads: [K E V]; narrower ones have rows of zeros.
    sha256: of all weights.
  """

  def __init__(self, config: RunConfig, tokenizer: Any):
    """Reads the teachers that objective.teachers names.

    Args:
      config: of the run.
      tokenizer: of the run's data.

    Raises:
      InputError: there is none, or one has another vocabulary.
    """
    named = config.objective.teachers
    if not named:
      raise InputError(
        'objective.teachers: names none; set it to their folders and weights,'
        " as {'runs/teacher': 1.0}"
      )
    self._teachers = []
    for folder in named:
      try:
        one = opening.opened(folder, config.model.compute.products)
      except InputError as error:
        raise InputError(f'objective.teachers: {error}') from None
      check(one, config, tokenizer)
      self._teachers.append(_Teacher(one, _laid(one, config)))
    heads = [t.model.head(t.variables) for t in self._teachers]
    wide = [np.asarray(head, np.float32) for head in heads]
    self.heads = distill.stacked(wide)
    self._placed = False
    self.sha256 = hashlib.sha256(
      ''.join(t.sha256 for t in self._teachers).encode()
    ).hexdigest()

  def _place(self) -> None:
    """Lays weights and heads on the mesh, once, in all processes together."""
    if self._placed:
      return
    for one in self._teachers:
      one.place()
    # Of the host, so that every process can give its devices theirs.
    self.heads = jax.device_put(self.heads, self._teachers[0].where.copied)
    self._placed = True

  def say(self, batch: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns a batch with 'teacher_hidden' [B T+1 K E] and 'teacher_heads'.

    Every process must ask, with the same rows.
    """
    self._place()
    read = {
      name: batch[name]
      for name in ('tokens', 'segments', 'positions', 'ngrams')
      if name in batch
    }
    width = self.heads.shape[1]
    states = []
    for one in self._teachers:
      state = one.states(read)
      # One token and some width more: neither changes a logit.
      more = (0, 0), (0, 1), (0, width - state.shape[2])
      states.append(np.pad(state, more))
    hidden = np.stack(states, axis=2)
    return {**batch, 'teacher_hidden': hidden, distill.HEADS: self.heads}


def _laid(teacher: opening.Opened, config: RunConfig) -> placement.Placement:
  """Returns where a teacher lies: on the student's mesh, by its rules.

  Raises:
    InputError: it does not fit.
  """
  try:
    return placement.choose(config.mesh, teacher.model.abstract)
  except InputError as error:
    raise InputError(f'objective.teachers: {teacher.folder}: {error}') from None


def check(teacher: opening.Opened, config: RunConfig, tokenizer: Any) -> None:
  """Raises InputError unless a teacher's tokens are those of the student."""
  theirs, mine = teacher.model.config.vocab_size, config.model.vocab_size
  where = f'objective.teachers: {teacher.folder}'
  if theirs != mine:
    raise InputError(
      f'{where} has a vocabulary of {theirs} tokens, the student of {mine}:'
      ' they must be the same; set model.vocab_size, or distil by samples of'
      ' the teacher (experiments.distill --task)'
    )
  if teacher.tokenizer.sha256 != tokenizer.sha256:
    raise InputError(
      f'{where} has another tokenizer than data.tokenizer ='
      f' {config.data.tokenizer!r}: a token must mean the same to both; set it'
      f" to '{teacher.folder}/tokenizer.json', or distil by samples of the"
      ' teacher (experiments.distill --task)'
    )


def _hidden(
  model: Model, place: NamedSharding | None
) -> Callable[[dict, dict], jax.Array]:
  """Returns (variables, batch) -> last hidden states [B T E].

  Args:
    model: a teacher.
    place: sharding of what it returns, on a mesh.
  """

  def run(variables: dict, batch: dict) -> jax.Array:
    inputs = next_token(batch)
    return model.apply(
      variables,
      inputs.tokens,
      positions=inputs.positions,
      segment_ids=inputs.segments,
    ).hidden

  how = processor.options('train', model.config.compute.xla)
  return jax.jit(run, out_shardings=place, compiler_options=how)


def _block(batch: Mapping[str, Any], index: int, count: int) -> dict[str, Any]:
  """Returns the rows of block `index` of `count`; heads are of no row."""
  rows = len(batch['tokens']) // count
  own = lambda a: a[index * rows : (index + 1) * rows]
  return {n: a if n == distill.HEADS else own(a) for n, a in batch.items()}


class TaughtBatches(PackedBatches):
  """Draws packed conversations, with what the teachers say of them."""

  def __init__(self, store: ConversationStore, config: RunConfig):
    """Packs the examples and reads the teachers."""
    super().__init__(store, config.data)
    self._teachers = Teachers(config, store.tokenizer())
    self._stream[_STREAM] = self._teachers.sha256

  def next(
    self, batch_size: int, process_index: int = 0, process_count: int = 1
  ) -> dict[str, np.ndarray]:
    """Returns the next rows, with what the teachers say of them.

    Args:
      batch_size: how many, in all processes together.
      process_index, process_count: which block of them, and of how many.
    """
    said = self._teachers.say(super().next(batch_size))
    return _block(said, process_index, process_count)

  def set_state(self, state: dict) -> None:
    """Continues after `get_state`; InputError if it is of another stream."""
    _check_same(self._teachers, state)
    super().set_state(state)


class StudentBatches(rl.PromptBatches):
  """Draws answers of the student, with what the teachers say of them.

  Its place is the number of the round, which alone decides the seeds: a round
  that was killed is drawn again. Rewards are computed for the record: every
  answer teaches, whatever its reward.
  """

  def __init__(self, store: rl.TaskStore, config: RunConfig):
    """Reads the teachers; samples nothing yet."""
    super().__init__(store, config)
    self._teachers = Teachers(config, store.tokenizer())
    self.windows = self.rounds
    self._stream[_STREAM] = self._teachers.sha256
    self._model = build(config.model)
    self._where = placement.choose(config.mesh, self._model.abstract)
    self._answering: Answering | None = None
    asked = config.rollouts
    self._sampled = AnswerConfig(
      n=asked.group,
      most=asked.most,
      temperature=asked.temperature,
      top_p=asked.top_p,
      slots=asked.slots,
      seconds=asked.seconds,
      processes=asked.processes,
    )

  def next(
    self, batch_size: int, process_index: int = 0, process_count: int = 1
  ) -> dict[str, np.ndarray]:
    """Returns a round: answers to the next N prompts, packed.

    Args:
      batch_size: rows, at most; what is left of them is padding.
      process_index, process_count: which block of them, and of how many.

    Raises:
      InputError: the answers do not fit so many rows.
    """
    count = self._run_config.rollouts.prompts
    first = self._next * count
    places = [int(self._order[i]) for i in range(first, first + count)]
    seed = _seed(self._config.seed, self._next)
    with self._where.use():
      answering = self._ready(self._variables())
      groups = answering.ask(places, self._sampled, seed)
    rows = self._packed(answering, places, groups, batch_size)
    self.told = _statistics([one for group in groups for one in group])
    self._next += 1
    return _block(self._teachers.say(rows), process_index, process_count)

  def _packed(
    self,
    answering: Answering,
    places: Sequence[int],
    groups: Sequence[Sequence[Scored]],
    size: int,
  ) -> dict[str, np.ndarray]:
    """Returns the answers laid out in rows; what was sampled is learnt."""
    sequences = []
    for place, group in zip(places, groups):
      prompt = answering.prompts[place]
      for one in group:
        tokens = np.array([*prompt, *one.tokens], np.int32)
        trained = (np.arange(len(tokens)) >= len(prompt)).astype(np.float32)
        sequences.append({'tokens': tokens, 'trained': trained})
    length = self._config.seq_len + 1
    rows = packing.best_fit([len(s['tokens']) for s in sequences], length)
    if len(rows) > size:
      raise InputError(
        f'train.batch.size = {size}: {len(sequences)} answers need {len(rows)}'
        f' rows of {length} tokens; set it to {len(sequences)}, or data.seq_len'
        ' higher'
      )
    rows += [[]] * (size - len(rows))
    pad = self._store.tokenizer().pad_id
    return packing.laid_out(sequences, rows, length, pad=pad)

  def _ready(self, variables: dict) -> Answering:
    """Returns what samples answers, with these weights; call it on the mesh."""
    if self._answering is None:
      store = self._store
      asked = Asked(self._model, variables, store.tokenizer(), store.chat)
      # Held-out problems behind the others: they have the same shapes.
      problems = (*store.task.train, *store.task.heldout)
      self._answering = Answering(asked, store.task, problems, self._sampled)
    else:
      self._answering.load(variables)
    return self._answering

  def answered(
    self, variables: dict, limit: int | None = None
  ) -> dict[str, float]:
    """Returns the mean reward of the likeliest answers to held-out prompts."""
    task = self._store.task
    if not task.heldout:
      return {}
    count = len(task.heldout[:limit])
    places = range(len(task.train), len(task.train) + count)
    greedy = dataclasses.replace(self._sampled, n=1, temperature=0.0)
    with self._where.use():
      groups = self._ready(variables).ask(places, greedy, 0)
    told = _statistics([one for [one] in groups]) if groups else {}
    return {'heldout_reward': told.get('reward', float('nan'))}

  def set_state(self, state: dict) -> None:
    """Continues after `get_state`; InputError if it is of another stream."""
    _check_same(self._teachers, state)
    super().set_state(state)


def _seed(seed: int, number: int) -> int:
  """Returns the seed of a round; rounds and runs are far apart."""
  digest = hashlib.sha256(f'student {seed} {number}'.encode()).digest()
  return int.from_bytes(digest[:7], 'big')


def _statistics(some: Sequence[Scored]) -> dict[str, float]:
  """Returns what there is to say of answers."""
  known = [one.reward for one in some if one.reward is not None]
  return {
    'reward': float(np.mean(known)) if known else float('nan'),
    'truncated': float(np.mean([not one.whole for one in some])),
    'answer_length': float(np.mean([len(one.tokens) for one in some])),
    'verifier_errors': len(some) - len(known),
  }


def _check_same(teachers: Teachers, state: Mapping) -> None:
  """Raises InputError where a saved run had other teachers."""
  if state.get(_STREAM) != teachers.sha256:
    raise InputError(
      'objective.teachers: their weights are not those that the saved run had'
      ' (sha256 of all); put the teachers back, or begin another run'
    )
