"""Draws the batches of a run from its own weights: rollouts, scored.

`fit` reads them as it reads text. A round of rollouts gives one update or
several, a mini-batch each; the old policy of their ratios is that of the
round's beginning. The seeds of a round depend on its number alone and the
engine computes in one shape, so a round that was killed is drawn again with the
same answers; one that has given some of its updates is in the checkpoint.
Legend: N prompts, G answers of a prompt.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from deepseek_jax import say
from deepseek_jax.data import batches
from deepseek_jax.data.tokenizer import ByteTokenizer, Tokenizer
from deepseek_jax.errors import InputError
from deepseek_jax.model.transformer import build
from deepseek_jax.parallel import placement
from deepseek_jax.parallel import processes as distributed
from deepseek_jax.rl import chats, rollout, scoring, tasks
from deepseek_jax.rl.chats import ChatWriter
from deepseek_jax.rl.conversation_store import tokenizer_of
from deepseek_jax.rl.rollout import Rollout
from deepseek_jax.run.answerer import Answerer
from deepseek_jax.run.config import RunConfig
from deepseek_jax.run.reference_policy import ReferencePolicy


@dataclasses.dataclass(frozen=True)
class TaskStore:
  """Holds the problems of a run, where others have their text.

  Attributes:
    task: problems and rewards.
    chat: how prompts are written.
  """

  task: tasks.Task
  chat: ChatWriter
  _tokenizer: Tokenizer | ByteTokenizer

  @property
  def index(self) -> dict:
    """Returns the hash of the tokenizer, where a `data.TokenStore` has it."""
    return {'tokenizer': {'sha256': self._tokenizer.sha256}}

  @property
  def train_sha256(self) -> str:
    """Returns the SHA-256 of the task."""
    return self.task.sha256

  @property
  def heldout_sha256(self) -> str:
    """Returns the SHA-256 of the task, its held-out problems with it."""
    return self.task.sha256

  def tokenizer(self) -> Tokenizer | ByteTokenizer:
    """Returns the tokenizer."""
    return self._tokenizer


def opened(config: RunConfig) -> TaskStore:
  """Returns the task that data.path names; InputError if it is wrong.

  Raises:
    InputError: names the file, or a prompt that is too long, or a chat whose
      answers never end.
  """
  task, made = tasks.read(config.data.path), tokenizer_of(config.data)
  store = TaskStore(task, config.chat.build(made), made)
  _check_ends(config, store.chat)
  room = config.data.seq_len + 1 - config.rollouts.most
  for problem in (*task.train, *task.heldout):
    size = len(store.chat.prompt(problem['prompt']))
    if size > room:
      raise InputError(
        f'data.seq_len = {config.data.seq_len}: a prompt of {size} tokens and'
        f' rollouts.most = {config.rollouts.most} do not fit; the prompt begins'
        f' {problem["prompt"][:40]!r}; raise data.seq_len'
      )
  return store


def _check_ends(config: RunConfig, chat: ChatWriter) -> None:
  """Raises InputError where no token would end an answer."""
  cfg = config.chat
  named = f'chat.format = {cfg.format!r}'
  named += f', chat.folder = {cfg.folder!r}' if cfg.folder else ''
  said = [
    {'role': 'user', 'content': 'a'},
    {'role': 'assistant', 'content': 'b'},
  ]
  try:
    turns = chat.turns(said)
  except InputError:  # a template may change what is answered; prompts are read
    turns = []
  try:
    for turn in turns:
      chats.check(turn, chat.ends)
  except InputError as error:
    raise InputError(f'{named}: {error}') from None
  if not chat.ends:
    raise InputError(
      f'{named}: no token ends an answer, so all would be cut at rollouts.most;'
      ' use a chat format that ends turns'
    )


class PromptBatches(batches.Batches):
  """Is the base of batches whose answers the run's own weights give.

  Problems come in an order that `data.seed` decides.
  """

  def __init__(self, store: TaskStore, config: RunConfig):
    """Takes the problems and the run; samples nothing."""
    self._store, self._run_config = store, config
    self._config = config.data
    self._recut, self.drawn = False, []
    problems = store.task.train
    self._order = batches.shuffled(len(problems), str(config.data.seed))
    self.rounds = -(-len(problems) // config.rollouts.prompts)  # in an epoch
    self._stream = {
      'train_sha256': store.train_sha256,
      'heldout_sha256': store.heldout_sha256,
      'seq_len': config.data.seq_len,
      'seed': config.data.seed,
    }
    self._tokenizer = store.index['tokenizer']['sha256']
    self._next, self.ngrams = 0, None
    self.told: dict[str, float] = {}
    self._variables: Callable[[], dict] | None = None

  def _open(self, *, recut: bool) -> None:
    """Does nothing: problems are in memory."""

  def see(self, variables: Callable[[], dict]) -> None:
    """Takes a way to the weights that the next round is drawn by."""
    self._variables = variables


class RolloutBatches(PromptBatches):
  """Draws rounds of rollouts; its place is the number of the update."""

  def __init__(self, store: TaskStore, config: RunConfig):
    """Makes what samples, scores and compares; samples nothing."""
    super().__init__(store, config)
    model = build(config.model)
    where = placement.choose(config.mesh, model.abstract)
    self.windows = self.rounds * config.rollouts.steps
    self._place = 0
    tell = say.warn if distributed.first() else lambda line: None
    self._tell, self._equal = tell, 0
    self._answerer = Answerer(config, model, where, store, tell)
    self._reference = ReferencePolicy(config, model, where)
    self._where = where
    self._score = scoring.scorer(model, config.objective, where.copied)
    self._route = scoring.router(model, where.copied)
    self._round: dict[str, np.ndarray] | None = None

  def next(
    self, batch_size: int, process_index: int = 0, process_count: int = 1
  ) -> dict[str, np.ndarray]:
    """Returns this process's rows of the next mini-batch of answers.

    The first one of a round draws it: answers of the next N prompts, packed and
    scored.

    Args:
      batch_size: rows of a mini-batch; what is left of them is padding.
      process_index, process_count: which block of them, and of how many.

    Raises:
      InputError: the answers do not fit so many rows, or none has a score.
    """
    cfg = self._run_config.rollouts
    within = self._next % cfg.steps
    if within == 0:
      self._round = self._drawn(batch_size)
    elif self._round is None:
      raise InputError(
        f'next_index={self._next} in the saved data state: the checkpoint is of'
        ' the middle of a round of rollouts and does not hold it; resume from'
        ' another checkpoint'
      )
    else:
      self.told = {}
    self._next += 1
    rows = batch_size // process_count
    low = within % cfg.updates * batch_size + process_index * rows
    return {name: a[low : low + rows] for name, a in self._round.items()}

  def _drawn(self, rows: int) -> dict[str, np.ndarray]:
    """Returns the next round: its mini-batches, one after the other."""
    config, variables = self._run_config, self._variables()
    number = self._next // config.rollouts.steps
    seed = _seed(config.data.seed, number)
    groups, rewards = self._groups(variables, seed)
    if config.rollouts.permuted:
      # Places of the answers, [N G]; rewards may be several of each.
      places = np.arange(len(rewards) * rewards.shape[1])
      places = places.reshape(rewards.shape[:2])
      dealt = np.random.default_rng(seed).permuted(places)
      rewards = rewards[np.divmod(dealt, rewards.shape[1])]
    made = rollout.lesson(groups, rewards, config.objective)
    self.told |= made.statistics
    self._note_equal(made.statistics)
    out = rollout.mini_batches(
      made,
      config.data.seq_len + 1,
      rows,
      config.rollouts.updates,
      seed=seed,
      pad=self._store.tokenizer().pad_id,
    )
    return out | self._compared(variables, out, rows, number)

  def _groups(
    self, variables: dict, seed: int
  ) -> tuple[list[list[Rollout]], np.ndarray]:
    """Returns all groups of a round and their rewards; the place moves on.

    With dynamic sampling others are drawn until rewards differ in N of them,
    `redraws` times at most.
    """
    cfg, objective = self._run_config.rollouts, self._run_config.objective
    groups: list[list[Rollout]] = []
    rewards, errors, lack = None, 0, cfg.prompts
    before = self._answerer.drafted
    for _ in range(1 + cfg.redraws * objective.dynamic_sampling):
      places = range(self._place, self._place + lack)
      own = self._store.task.train
      problems = [own[self._order[place]] for place in places]
      more = self._answerer.groups(variables, problems, seed, len(groups))
      found, wrong = self._answerer.rewards(more, problems)
      self._place, errors = self._place + lack, errors + wrong
      groups += more
      rewards = found if rewards is None else np.concatenate([rewards, found])
      lack = cfg.prompts - int(rollout.varied(rewards, objective).sum())
      if not lack:
        break
    self.told = {
      'verifier_errors': errors,
      'redrawn': 1 - cfg.prompts / len(groups),
    }
    accepted, drafts = np.subtract(self._answerer.drafted, before)
    if drafts:
      self.told['acceptance'] = float(accepted / drafts)
    return groups, rewards

  def _note_equal(self, statistics: dict[str, float]) -> None:
    """Says so where rewards have been equal for many rounds."""
    share = statistics['equal_groups']
    self._equal = self._equal + 1 if share == 1 else 0
    patience = self._run_config.rollouts.patience
    if patience and self._equal and self._equal % patience == 0:
      self._tell(
        f'rewards: for {self._equal} rounds in a row the answers of each group'
        f' had equal rewards ({share:.0%} of the groups, mean reward'
        f' {statistics["reward"]:.3g}): nothing is learnt from them; look at'
        ' the rewards, or choose prompts that are answered rightly now and then'
      )

  def _compared(
    self, variables: dict, out: dict[str, np.ndarray], rows: int, number: int
  ) -> dict[str, np.ndarray]:
    """Returns the log-probs of a round that need passes of the trainer.

    Args:
      variables: that the round was drawn by.
      out: the round.
      rows: of a mini-batch.
      number: of the round.
    """
    config, more = self._run_config, {}
    every = config.rollouts.compare_every
    due, several = every and number % every == 0, config.rollouts.steps > 1
    if due or several:
      old = self._each(self._score, variables, out, rows)
      self.told |= scoring.mismatch(out | {'old': old})
      if several:  # of one update the step's own values are the old ones
        more['old'] = old
    if due and 'routes' in out:
      live = self._each(self._route, variables, out, rows)
      self.told |= scoring.differing(out['routes'][:, :-1], live)
    if config.objective.kl != 'none':
      reference = self._reference.settle(self._next, variables)
      more['reference'] = self._each(self._score, reference, out, rows)
    return more

  def _each(
    self, run: Callable, variables: dict, out: dict[str, np.ndarray], rows: int
  ) -> np.ndarray:
    """Returns what a forward pass gives for each mini-batch, joined."""

    def parts() -> Iterator[np.ndarray]:
      for low in range(0, len(out['tokens']), rows):
        part = {name: a[low : low + rows] for name, a in out.items()}
        yield np.asarray(run(variables, part))

    with self._where.use():
      return np.concatenate(list(parts()))

  def first(self) -> dict:
    """Returns the weights that the run began with."""
    return self._reference.first()

  def answered(
    self, variables: dict, limit: int | None = None
  ) -> dict[str, float]:
    """Returns the mean reward of the likeliest answers to held-out prompts."""
    if not self._store.task.heldout:
      return {}
    found = self._answerer.greedy(variables, self._store.task.heldout[:limit])
    known = [reward for reward in found if np.isfinite(reward)]
    return {'heldout_reward': float(np.mean(known)) if known else float('nan')}

  def get_state(self) -> dict:
    """Returns the state of `Batches`, and the place of the next prompt."""
    return super().get_state() | {'next_prompt': self._place}

  def set_state(self, state: dict) -> None:
    """Continues after `get_state`; InputError if it is of another stream."""
    super().set_state(state)
    cfg = self._run_config.rollouts
    place = state.get('next_prompt', self._next * cfg.prompts)
    if not isinstance(place, int) or isinstance(place, bool) or place < 0:
      raise InputError(
        f'next_prompt={place!r} in the saved data state: it is damaged; resume'
        ' from another checkpoint'
      )
    self._place, self._round = place, None

  def held(self) -> dict[str, Any]:
    """Returns what a checkpoint holds beside the state, as trees of arrays.

    The reference, and a round that has updates left.
    """
    out: dict[str, Any] = {}
    if self._reference.weights is not None:
      out['reference'] = self._reference.weights
    if self._round is not None and self._next % self._run_config.rollouts.steps:
      out['round'] = self._round
    return out

  def take(self, held: dict[str, Any]) -> None:
    """Takes back what `held` returned, after `set_state`."""
    self._reference.weights = held.get('reference')
    self._round = held.get('round')


def _seed(seed: int, number: int) -> int:
  """Returns the seed of a round; rounds and runs are far apart."""
  digest = hashlib.sha256(f'rollouts {seed} {number}'.encode()).digest()
  return int.from_bytes(digest[:7], 'big')
