"""Serves many requests at once: continuous batching over a paged cache.

Each step lets every running answer draw some tokens, then prefills some chunks
of the oldest prompts that aren't cached yet. The model is the training model,
its shapes are buckets: after `warm_up` nothing is compiled any more. One thread
alone may call an engine.
Legend: R rows, T tokens of a chunk, P tokens of a page, L MoE layers.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from deepseek_jax.errors import InputError, check_type
from deepseek_jax.infer import checks, host_arrays, outcomes, sampler, warm_up
from deepseek_jax.infer.detokenize import following
from deepseek_jax.infer.engine_config import EngineConfig
from deepseek_jax.infer.host_arrays import Ahead, Bucket, look_ahead
from deepseek_jax.infer.paging import beside, copied, paging
from deepseek_jax.infer.prepared import build_flat, prepare
from deepseek_jax.infer.programs import Decoded, Shape, programs
from deepseek_jax.infer.request import (
  Answer,
  Event,
  Finish,
  Request,
  Usage,
  answer,
)
from deepseek_jax.infer.scheduler import Scheduler, Sequence
from deepseek_jax.model.transformer import Model
from deepseek_jax.parallel.sharding import current

_DEFAULT = EngineConfig()


class EngineBusy(InputError):
  """Reports that no more requests can wait: try again later."""


class Engine:
  """Answers requests; see the module."""

  def __init__(
    self,
    model: Model,
    variables: dict,
    cfg: EngineConfig = _DEFAULT,
    *,
    text: Any = None,
    donate: bool = False,
  ):
    """Makes an engine; allocates its cache.

    Args:
      model, variables: as the model trains; `load` gives other variables.
      cfg: see there.
      text: the tokenizer, for texts and stop texts; token ids alone without.
      donate: the variables are given up, see `prepare`.

    Raises:
      InputError: a model without head, or a tokenizer with more tokens than
        the model.
    """
    check_type('model', model, Model, 'ds.build(config) makes one')
    check_type('cfg', cfg, EngineConfig, 'as in ds.EngineConfig(slots=8)')
    self.model, self.cfg, self.text = model, cfg, text
    checks.check_text(text, model)
    flat = build_flat(model)
    self._paging = paging(flat, cfg.page, cfg.drafts)
    self.page = self._paging.page
    self.context = cfg.context
    buckets = cfg.page_buckets(self.page)
    pages = cfg.pages or cfg.slots * buckets[-1]
    rings = self._paging.has_rings
    spare = cfg.snapshots if cfg.snapshots is not None else 2 * cfg.slots
    # What another request has cached may differ in its last bits.
    reuse = cfg.reuse and not cfg.deterministic
    spare = spare if rings and reuse else 0
    how = {'reuse': reuse, 'rings': rings, 'ahead': self._paging.ahead}
    self._scheduler = Scheduler(
      self.page, pages, cfg.slots, snapshots=spare, **how
    )
    # One page more: the scratch page.
    self._store = self._paging.empty(pages + 1, cfg.slots + spare)
    drafted = cfg.most_drafted()
    shape = Shape(self._paging, cfg.steps, drafted, cfg.routing, cfg.kept)
    self._run = programs(model, shape, current())
    self._bounds = checks.bounds(model, cfg, self.page, pages, text is not None)
    self._count, self._epoch = 0, 0
    self._live: dict[int, list[Sequence]] = {}
    self._cancelled: list[int] = []
    self._totals = collections.Counter()
    self._loads: collections.OrderedDict = collections.OrderedDict()
    self._variables: dict = {}
    self.load(variables, donate=donate)

  # What requests do.

  def submit(self, request: Request) -> int:
    """Takes a request in; returns its number.

    Raises:
      InputError: it can't be answered: too long, or an unknown token.
      EngineBusy: too many are waiting.
    """
    checks.check_request(request, self._bounds)
    if len(self._scheduler.waiting) + request.n > self.cfg.queue:
      raise EngineBusy(
        f'{len(self._scheduler.waiting)} answers wait, of {self.cfg.queue} that'
        ' may (engine.queue): try again later'
      )
    number, self._count = self._count, self._count + 1
    vocab, compute = self.model.config.vocab_size, self.model.config.compute
    made = []
    for index in range(request.n):
      seed = int(request.sampling.seed) + index
      buffer = np.zeros(self.context, np.int32)
      buffer[: len(request.prompt)] = request.prompt
      made.append(
        Sequence(
          request,
          number,
          index,
          sampler.settings(request, seed, vocab),
          buffer,
          len(request.prompt),
          f'{self._epoch} {compute.products} {compute.cache} {request.salt}',
          text=following(self.text, request),
          matcher=self._matcher(request),
          scores=[None] if request.echo else [],
        )
      )
    self._live[number] = made
    self._scheduler.waiting.extend(made)
    return number

  def _matcher(self, request: Request) -> Any:
    """Returns what follows the request's grammar, or None."""
    if request.grammar is None:
      return None
    vocab = self.model.config.vocab_size
    stops = request.sampling.stop
    return request.grammar.matcher(self.text, vocab, stops)

  def cancel(self, request: int) -> None:
    """Ends a request; its last events come with the next step."""
    if request in self._live:
      self._cancelled.append(request)

  def busy(self) -> bool:
    """Returns whether anything waits, runs, or has still to be reported."""
    return bool(self._live)

  def stream(self, request: Request) -> Iterator[Event]:
    """Yields the events of one request until all its answers have ended.

    Others that were submitted go on too, but their events are lost.
    """
    number = self.submit(request)
    try:
      while number in self._live:
        yield from (e for e in self.step() if e.request == number)
    finally:
      self.cancel(number)

  def run(self, requests: Iterable[Request]) -> list[list[Answer]]:
    """Returns the answers of each request, in order.

    More of them than the queue takes wait here.
    """
    if isinstance(requests, Request):
      raise InputError('requests: is one Request; give a list of them')
    left = collections.deque(requests)
    for request in left:  # before any of them runs
      checks.check_request(request, self._bounds)
    order, events = [], collections.defaultdict(list)
    while left or self.busy():
      while left:
        try:
          order.append((self.submit(left[0]), left[0].n))
        except EngineBusy:
          if not self.busy():
            raise
          break
        left.popleft()
      for event in self.step():
        events[event.request, event.index].append(event)
    return [[answer(events[i, k]) for k in range(n)] for i, n in order]

  def load(self, variables: dict, *, donate: bool = False) -> None:
    """Takes new weights: forgets prefixes, and recomputes what runs.

    With `donate` the caller gives them up, see `prepare`.

    Raises:
      InputError: they are another model's; the old ones stay.
    """
    checks.check_variables(self.model, variables)
    self._variables = {}  # the old ones go before the new ones are laid out
    self._variables = prepare(self.model, variables, donate=donate)
    self._store = beside(self._store, self._variables)
    self._epoch += 1
    self._scheduler.forget()

  @property
  def stats(self) -> dict[str, int]:
    """Returns counts since the start, and what is in use now."""
    schedule = self._scheduler
    return {
      **{name: self._totals[name] for name in _TOTALS},
      'pages': schedule.pages.total,
      'pages_free': schedule.pages.free,
      'running': len(schedule.running),
      'waiting': len(schedule.waiting),
      'preempted': schedule.preempted,
      'compilations': self._run.compiled(),
      'cache_bytes': sum(a.nbytes for a in jax.tree.leaves(self._store)),
    }

  def expert_load(self, request: int) -> np.ndarray | None:
    """Returns how often the answers' tokens chose each expert, [L_moe, E].

    None unless engine.routing, and once many other requests have ended.
    """
    some = [s.experts for s in self._live.get(request, ())]
    some = [self._loads.get(request), *some]
    some = [one for one in some if one is not None]
    return sum(some) if some else None

  # What a step does.

  def step(self) -> list[Event]:
    """Runs one step: every running answer draws, then chunks are prefilled.

    Returns:
      What each answer got; [] if there was nothing to do.
    """
    events = [self._ended(s, 'cancelled') for s in self._take_cancelled()]
    for one, snapshot in self._scheduler.admit():
      if snapshot is not None:
        self._store = copied(self._store, snapshot, one.slot)
    if self._scheduler.running:
      self._totals['steps'] += 1
    events += self._decode()
    all(self._prefill() for _ in range(self.cfg.prefills))  # until none is left
    return events

  def _take_cancelled(self) -> list[Sequence]:
    """Returns the sequences of requests that were cancelled."""
    numbers, self._cancelled = self._cancelled, []
    return [s for n in dict.fromkeys(numbers) for s in self._live.get(n, [])]

  def _decode(self) -> list[Event]:
    """Lets all rows that can draw tokens: their events."""
    going = [s for s in self._scheduler.running if not s.to_prefill]
    events = self._masked(going)
    if not going:
      return events
    size = _least(self.cfg.row_buckets(), len(going))
    # A grammar says what comes next when it has seen what came.
    grammars = any(s.matcher is not None for s in going)
    calls = 1 if grammars else self.cfg.steps
    steps = calls * (1 + self.cfg.drafts_of(size))
    limits = {}
    for one in list(going):
      if one.slot is None:  # preempted for an older one
        continue
      limit = min(steps, one.left)
      border = self._scheduler.border(one)
      if border is not None:
        limit = min(limit, border - one.cached)
      if self._scheduler.grow(one, one.cached + limit):
        limits[one] = limit
    going = [s for s in going if s.slot is not None and s in limits]
    if not going:
      return events
    out = self._drawn(going, [limits[s] for s in going], calls)
    self._totals['decode_calls'] += int(out.calls.max())
    drafts = out.drawn.token.shape[1] // self.cfg.steps - 1
    for i, one in enumerate(going):
      rejected = drafts * int(out.calls[i]) - int(out.accepted[i])
      one.drafts[0] += int(out.accepted[i])
      one.drafts[1] += rejected
      self._totals['accepted_drafts'] += int(out.accepted[i])
      self._totals['drafts'] += drafts * int(out.calls[i])
    return events + [self._advance(one, i, out) for i, one in enumerate(going)]

  def _drawn(
    self, going: list[Sequence], limits: list[int], calls: int
  ) -> Decoded:
    """Runs the model on rows, so many times at most: what they draw."""
    size = _least(self.cfg.row_buckets(), len(going))
    ends = [s.cached + n for s, n in zip(going, limits)]
    bucket = Bucket(size, 1, self._pages(max(ends)))
    vocab = self.model.config.vocab_size
    where = host_arrays.rows(going, bucket, [1] * len(going))
    draws = host_arrays.draws(going, bucket, self.page, vocab)
    ahead = Ahead(calls, self.cfg.drafts_of(size), sampler.words(vocab))
    how = host_arrays.going(going, bucket, limits, ahead)
    if ahead.drafts and any(s.matcher is not None for s in going):
      args = self._variables, self._store, where, how, draws
      self._store, drafts = self._run.draft(*args)
      ahead, limits = look_ahead(going, jax.device_get(drafts), limits, ahead)
      how = host_arrays.going(going, bucket, limits, ahead)
    self._store, out = self._run.decode(
      self._variables, self._store, where, how, draws
    )
    return jax.device_get(out)

  def _masked(self, going: list[Sequence]) -> list[Event]:
    """Asks the grammars of rows what may come; takes out those that fail.

    Returns:
      The last events of these.
    """
    events = []
    for one in [s for s in going if s.matcher is not None]:
      try:
        one.allowed = one.matcher.mask()
      except InputError as error:
        going.remove(one)
        events.append(self._ended(one, 'error', error=str(error)))
    return events

  def _advance(self, one: Sequence, row: int, out: Decoded) -> Event:
    """Takes what a row has drawn: its event."""
    taken = outcomes.take(one, row, out, self.model)
    self._totals['tokens'] += len(taken.tokens)
    if taken.finish == 'error':  # what it has cached may be wrong
      return self._ended(one, **taken._asdict())
    self._keep(one)
    if taken.finish:
      return self._ended(one, **taken._asdict())
    return Event(one.id, one.index, **taken._asdict())

  def _keep(self, one: Sequence) -> None:
    """Makes full pages known, and keeps the rings where that is worth it."""
    slot = self._scheduler.name(one)
    if slot is not None:
      self._store = copied(self._store, one.slot, slot)

  def _ended(
    self, one: Sequence, finish: Finish, error: str | None = None, **how: Any
  ) -> Event:
    """Takes a sequence out; returns its last event."""
    self._scheduler.end(one)
    rest = self._live[one.id]
    rest.remove(one)
    if one.experts is not None:
      self._loads[one.id] = self._loads.get(one.id, 0) + one.experts
      while len(self._loads) > _LOADS:
        self._loads.popitem(last=False)
    if not rest:
      del self._live[one.id]
    self._totals['prompt_tokens'] += one.prompt
    self._totals['cached_tokens'] += one.reused
    self._totals['answers'] += 1
    usage = Usage(one.prompt, one.reused, one.answered, *one.drafts)
    # A copy: the whole context would stay in memory.
    routes = None if one.routes is None else one.routes[: one.length].copy()
    return Event(
      one.id,
      one.index,
      finish=finish,
      error=error,
      usage=usage,
      routes=routes,
      **how,
    )

  def _prefill(self) -> bool:
    """Caches a chunk of the oldest prompts; False if there are none."""
    some, (rows, tokens) = self._scheduler.next_chunk(self.cfg.chunk_buckets())
    if not some:
      return False
    counts = [self._scheduler.chunk(s, tokens) for s in some]
    end = max(s.cached + n for s, n in zip(some, counts))
    bucket = Bucket(rows, tokens, self._pages(max(end, tokens)))
    echo = any(s.request.echo and not s.answered for s in some)
    self._store, scores, chosen = self._run.prefill(
      self._variables,
      self._store,
      host_arrays.rows(some, bucket, counts),
      host_arrays.chunk(some, bucket, counts, self.cfg.drafts, echo),
    )
    self._totals['prefilled'] += sum(counts)
    if echo:
      scores = jax.device_get(scores)
    if any(s.request.routes for s in some):
      chosen = jax.device_get(chosen)  # [L R T K]
    for i, (one, count) in enumerate(zip(some, counts)):
      if one.request.echo and not one.answered:
        outcomes.score(one, i, count, scores)
      if one.request.routes:
        route = chosen[:, i, :count].swapaxes(0, 1)
        outcomes.route(one, one.cached, route, self.model)
      one.cached += count
      self._keep(one)
    return True

  def _pages(self, tokens: int) -> int:
    """Returns the bucket of pages that holds so many tokens of a row."""
    buckets = self.cfg.page_buckets(self.page)
    return _least(buckets, self._scheduler.pages_for(tokens))

  # What comes before.

  def warm_up(self, say: Callable[[str], None] | None = None) -> None:
    """Compiles every bucket, on rows that are no request.

    Args:
      say: takes a line for each program.
    """
    self._store = warm_up.warm_up(
      self._run,
      self._variables,
      self._store,
      self.cfg,
      self.page,
      self.model.config.vocab_size,
      self.text is not None,
      say,
    )
    if self._paging.has_rings:
      self._store = copied(self._store, 0, 0)


_TOTALS = (
  'steps',
  'decode_calls',
  'answers',
  'tokens',
  'prompt_tokens',
  'cached_tokens',
  'prefilled',
  'drafts',
  'accepted_drafts',
)
_LOADS = 256  # ended requests whose expert load is kept


def _least(buckets: tuple[int, ...], need: int) -> int:
  """Returns the least bucket that is enough."""
  return next(b for b in buckets if b >= need)
