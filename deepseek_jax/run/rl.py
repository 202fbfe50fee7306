"""Draws the batches of a run from its own weights: rollouts, scored.

`fit` reads them as it reads text: one step learns from one round of rollouts.
The seeds of a round depend on its number alone and the engine computes in one
shape, so a run that was killed draws the same answers again.
Legend: N prompts, G answers of a prompt.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from deepseek_jax.data import batches
from deepseek_jax.data.tokenizer import ByteTokenizer, Tokenizer
from deepseek_jax.errors import InputError
from deepseek_jax.infer.engine import Engine, EngineConfig
from deepseek_jax.infer.request import Request, Sampling
from deepseek_jax.model.transformer import build
from deepseek_jax.rl import rollout, tasks
from deepseek_jax.rl.chats import ChatWriter
from deepseek_jax.rl.conversation_store import tokenizer_of
from deepseek_jax.rl.judge import Judge
from deepseek_jax.run import folder
from deepseek_jax.run.config import RunConfig
from deepseek_jax.train import warm_start


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
    InputError: names the file, or a prompt that is too long.
  """
  task, made = tasks.read(config.data.path), tokenizer_of(config.data)
  store = TaskStore(task, config.chat.build(made), made)
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


class RolloutBatches(batches.Batches):
  """Draws rounds of rollouts; its place is the number of the round."""

  def __init__(self, store: TaskStore, config: RunConfig):
    """Makes what samples, scores and compares; samples nothing."""
    self._store, self._run_config = store, config
    self._config = config.data
    self._recut, self.drawn = False, []
    self._model = build(config.model)
    problems = store.task.train
    order = batches.shuffled(len(problems), str(config.data.seed))
    self._problem = lambda place: problems[order[place]]
    self.windows = -(-len(problems) // config.rollouts.prompts)
    self._stream = {
      'train_sha256': store.train_sha256,
      'heldout_sha256': store.heldout_sha256,
      'seq_len': config.data.seq_len,
      'seed': config.data.seed,
    }
    self._tokenizer = store.index['tokenizer']['sha256']
    self._next = 0
    self.ngrams = None
    self.told: dict[str, float] = {}
    cfg = config.rollouts
    self._judge = Judge(store.task.rewards, cfg.seconds, cfg.processes)
    self._score = rollout.scorer(self._model, config.objective)
    self._engine: Engine | None = None
    self._reference: dict | None = None
    self._variables: Callable[[], dict] | None = None

  def _open(self, *, recut: bool) -> None:
    """Does nothing: problems are in memory."""

  def see(self, variables: Callable[[], dict]) -> None:
    """Takes a way to the weights that the next round is drawn by."""
    self._variables = variables

  def next(
    self, batch_size: int, process_index: int = 0, process_count: int = 1
  ) -> dict[str, np.ndarray]:
    """Returns a round: answers of the next N prompts, packed and scored.

    Args:
      batch_size: rows, at most; what is left of them is padding.
      process_index, process_count: must be 0 of 1.

    Raises:
      InputError: the answers do not fit so many rows, or none can be learnt.
    """
    if process_count != 1:
      raise InputError('rollouts: run in one process; start one')
    cfg, variables = self._run_config.rollouts, self._variables()
    places = range(self._next * cfg.prompts, (self._next + 1) * cfg.prompts)
    problems = [self._problem(place) for place in places]
    engine = self._ready(variables)
    prompts = [self._store.chat.prompt(p['prompt']) for p in problems]
    seed = _seed(self._run_config.data.seed, self._next)
    groups = rollout.sample(
      engine, prompts, cfg, stop=self._store.chat.ends, seed=seed
    )
    rewards, errors = self._rewards(groups, problems)
    if cfg.permuted:
      rewards = np.random.default_rng(seed).permuted(rewards)
    made = rollout.lesson(groups, rewards, self._run_config.objective)
    self.told = made.statistics | {'verifier_errors': errors}
    pad, length = (
      self._store.tokenizer().pad_id,
      self._run_config.data.seq_len + 1,
    )
    out = rollout.batch(made, length, batch_size, pad=pad)
    if len(out['tokens']) > batch_size:
      raise InputError(
        f'train.batch.size = {batch_size}: {len(made.sequences)} answers do not'
        f' fit so many rows of {length} tokens; set it to'
        f' {cfg.prompts * cfg.group}, or data.seq_len higher'
      )
    if self._run_config.objective.kl != 'none':
      out['reference'] = np.asarray(self._score(self.first(), out))
    self._next += 1
    return out

  def _ready(self, variables: dict) -> Engine:
    """Returns the engine with these weights."""
    if self._engine is None:
      cfg = self._run_config.rollouts
      context = self._run_config.data.seq_len + 1
      prompts = (*self._store.task.train, *self._store.task.heldout)
      longest = max(len(self._store.chat.prompt(p['prompt'])) for p in prompts)
      held = EngineConfig(
        slots=cfg.slots,
        context=context,
        page=min(64, context),
        budget=min(256, longest),  # one chunk a prompt, and no wider
        queue=cfg.prompts * cfg.group,
        deterministic=True,
      )
      self._engine = Engine(self._model, variables, held)
    else:
      self._engine.load(variables)
    return self._engine

  def _rewards(
    self, groups: Sequence[Sequence[rollout.Rollout]], problems: list[dict]
  ) -> tuple[np.ndarray, int]:
    """Returns rewards [N G], NaN where a verifier failed, and how many did."""
    before = self._judge.errors
    asked = [
      (self._text(one.tokens), {**problem, 'tokens': len(one.tokens)})
      for group, problem in zip(groups, problems)
      for one in group
    ]
    found = [verdict.reward for verdict in self._judge(asked)]
    shape = len(groups), len(groups[0])
    return np.reshape(found, shape), self._judge.errors - before

  def _text(self, tokens: Sequence[int]) -> str:
    """Returns an answer's text, without the token that ends it."""
    ends = self._store.chat.ends
    plain = [token for token in tokens if token not in ends]
    return self._store.tokenizer().decode(plain)

  def first(self) -> dict:
    """Returns the reference: the weights that the run began with."""
    if self._reference is None:
      state = folder.fresh_state(self._run_config, self._model)
      fresh = {'params': state.params, 'buffers': state.buffers}
      source = self._run_config.init_from
      if source:
        theirs = folder.load(source, same_code=False).variables
        fresh, _ = warm_start.variables(fresh, theirs, source)
      self._reference = fresh
    return self._reference

  def answered(
    self, variables: dict, limit: int | None = None
  ) -> dict[str, float]:
    """Returns the mean reward of the likeliest answers to held-out prompts."""
    problems = self._store.task.heldout[:limit]
    engine, cfg = self._ready(variables), self._run_config.rollouts
    greedy = Sampling(temperature=0.0, stop=tuple(self._store.chat.ends))
    asked = [
      Request(
        tuple(self._store.chat.prompt(p['prompt'])), cfg.most, sampling=greedy
      )
      for p in problems
    ]
    texts = [self._text(one.tokens) for [one] in engine.run(asked)]
    pairs: list[tuple[str, Mapping[str, Any]]] = list(zip(texts, problems))
    found = [verdict.reward for verdict in self._judge(pairs)]
    known = [reward for reward in found if reward == reward]
    return {'heldout_reward': float(np.mean(known)) if known else float('nan')}


def _seed(seed: int, number: int) -> int:
  """Returns the seed of a round; rounds and runs are far apart."""
  digest = hashlib.sha256(f'rollouts {seed} {number}'.encode()).digest()
  return int.from_bytes(digest[:7], 'big')
