"""Serves many requests at once: continuous batching over a paged cache.

Each step lets every running answer draw some tokens, then prefills a chunk of
the oldest prompt that isn't cached yet. The model is the training model, its
shapes are buckets: after `warm_up` nothing is compiled any more. One thread
alone may call an engine.
Legend: R rows, T tokens of a chunk, P tokens of a page, L MoE layers.
"""

import collections
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from deepseek_jax.errors import InputError
from deepseek_jax.infer import host_arrays, sampler
from deepseek_jax.infer.detokenize import Detokenizer
from deepseek_jax.infer.engine_config import EngineConfig
from deepseek_jax.infer.host_arrays import Bucket
from deepseek_jax.infer.paging import Store, paging
from deepseek_jax.infer.programs import STOPS, Decoded, Shape, programs
from deepseek_jax.infer.request import (
  Answer,
  Event,
  Finish,
  LogProb,
  Request,
  Usage,
  answer,
)
from deepseek_jax.infer.sampling import build_flat, prepare
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
  ):
    """Makes an engine; allocates its cache.

    Args:
      model, variables: as the model trains; `load` gives other variables.
      cfg: see there.
      text: the tokenizer, for texts and stop texts; token ids alone without.

    Raises:
      InputError: a model without head, or a tokenizer with more tokens than
        the model.
    """
    self.model, self.cfg, self.text = model, cfg, text
    self._check_text()
    flat = build_flat(model)
    self._paging = paging(flat, cfg.page, cfg.drafts)
    self.page = self._paging.page
    self.context = cfg.context
    buckets = cfg.page_buckets(self.page)
    pages = cfg.pages or cfg.slots * buckets[-1]
    rings = self._paging.has_rings
    spare = cfg.snapshots if cfg.snapshots is not None else 2 * cfg.slots
    spare = spare if rings and cfg.reuse else 0
    self._scheduler = Scheduler(
      self.page,
      pages,
      cfg.slots,
      snapshots=spare,
      reuse=cfg.reuse,
      rings=rings,
    )
    # One page more: the scratch page.
    self._store = self._paging.empty(pages + 1, cfg.slots + spare)
    most = cfg.slots if cfg.draft_rows is None else cfg.draft_rows
    shape = Shape(self._paging, cfg.steps, most, cfg.routing)
    self._run = programs(model, shape, current())
    self._count, self._epoch = 0, 0
    self._live: dict[int, list[Sequence]] = {}
    self._cancelled: list[int] = []
    self._totals = collections.Counter()
    self._loads: collections.OrderedDict = collections.OrderedDict()
    self.load(variables)

  def _check_text(self) -> None:
    """Raises InputError for a tokenizer that doesn't fit the model."""
    vocab = self.model.config.vocab_size
    size = getattr(self.text, 'vocab_size', 0)
    if size > vocab:
      raise InputError(
        f'tokenizer: has {size} tokens, the model {vocab}; give the tokenizer'
        ' that the model was trained with'
      )

  # What requests do.

  def submit(self, request: Request) -> int:
    """Takes a request in; returns its number.

    Raises:
      InputError: it can't be answered: too long, or an unknown token.
      EngineBusy: too many are waiting.
    """
    self._check(request)
    if len(self._scheduler.waiting) + request.n > self.cfg.queue:
      raise EngineBusy(
        f'{len(self._scheduler.waiting)} answers wait, of {self.cfg.queue} that'
        ' may (engine.queue): try again later'
      )
    number, self._count = self._count, self._count + 1
    vocab = self.model.config.vocab_size
    made = []
    for index in range(request.n):
      seed = request.sampling.seed + index
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
          f'{self._epoch} {self.model.config.compute.dtype} {request.salt}',
          text=self._detokenizer(request),
          matcher=self._matcher(request),
        )
      )
    self._live[number] = made
    self._scheduler.waiting.extend(made)
    return number

  def _detokenizer(self, request: Request) -> Detokenizer | None:
    """Returns what makes text of a request's tokens; None without any."""
    if self.text is None:
      return None
    stop = request.stop_strings
    return Detokenizer(self.text, after=request.prompt, stop=stop)

  def _matcher(self, request: Request) -> Any:
    """Returns what follows the request's grammar, or None."""
    if request.grammar is None:
      return None
    vocab = self.model.config.vocab_size
    stops = request.sampling.stop
    return request.grammar.matcher(self.text, vocab, stops)

  def _check(self, request: Request) -> None:
    """Raises InputError for a request that can't be answered."""
    vocab, length = self.model.config.vocab_size, len(request.prompt)
    biased = tuple(token for token, _ in request.sampling.logit_bias)
    fields = ('prompt', request.prompt), ('logit_bias', biased)
    for name, tokens in (*fields, ('stop', request.sampling.stop)):
      wrong = next((t for t in tokens if not 0 <= t < vocab), None)
      if wrong is not None:
        raise InputError(
          f'{name}: token {wrong} is outside the vocabulary of {vocab}'
        )
    if length >= self.context:
      raise InputError(
        f'prompt: {length} tokens leave no room for an answer in a context of'
        f' {self.context}; shorten it, or raise engine.context'
      )
    most = min(length + request.max_new_tokens, self.context)
    need = self._scheduler.pages_for(most)
    if need > self._scheduler.pages.total:
      raise InputError(
        f'prompt: {length} tokens and {request.max_new_tokens} new ones need'
        f' {need} pages of the cache, which has {self._scheduler.pages.total};'
        ' shorten them, or raise engine.pages'
      )
    counts = {
      'sampling.stop': (len(request.sampling.stop), STOPS),
      'logit_bias': (len(biased), sampler.BIASES),
      'logprobs': (request.logprobs or 0, sampler.TOP),
      'n': (request.n, self.cfg.queue),
    }
    for name, (given, most) in counts.items():
      if given > most:
        raise InputError(f'{name}: {given} given, at most {most} are taken')
    if self.text is None and (request.stop_strings or request.grammar):
      what = 'stop_strings' if request.stop_strings else 'grammar'
      raise InputError(f'{what}: needs the tokenizer: Engine(..., text=...)')

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
    left = collections.deque(requests)
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

  def load(self, variables: dict) -> None:
    """Takes new weights: forgets prefixes, and recomputes what runs."""
    self._variables = prepare(self.model, variables)
    self._store = _beside(self._store, self._variables)
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
    live = [s.experts for s in self._live.get(request, ())]
    live = [one for one in live if one is not None]
    return sum(live) if live else self._loads.get(request)

  # What a step does.

  def step(self) -> list[Event]:
    """Runs one step: every running answer draws, then one chunk is prefilled.

    Returns:
      What each answer got; [] if there was nothing to do.
    """
    events = [self._ended(s, 'cancelled') for s in self._take_cancelled()]
    for one, snapshot in self._scheduler.admit():
      if snapshot is not None:
        self._store = _copied(self._store, snapshot, one.slot)
    if self._scheduler.running:
      self._totals['steps'] += 1
    events += self._decode()
    self._prefill()
    return events

  def _take_cancelled(self) -> list[Sequence]:
    """Returns the sequences of requests that were cancelled."""
    numbers, self._cancelled = self._cancelled, []
    return [s for n in dict.fromkeys(numbers) for s in self._live.get(n, [])]

  def _decode(self) -> list[Event]:
    """Lets all rows that can draw tokens: their events."""
    going = [s for s in self._scheduler.running if not s.to_prefill]
    failed = [self._failed(s) for s in going if not _masked(s)]
    going = [s for s in going if s.failure is None]
    if not going:
      return failed
    size = _least(self.cfg.row_buckets(), len(going))
    drafts = self.cfg.drafts_of(size)
    # A grammar says what comes next when it has seen what came.
    alone = any(s.matcher for s in going)
    steps = 1 if alone else self.cfg.steps * (1 + drafts)
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
      return failed
    size = _least(self.cfg.row_buckets(), len(going))
    drafts = self.cfg.drafts_of(size)
    bucket = Bucket(
      size, 1, self._pages(max(s.cached + limits[s] for s in going))
    )
    vocab = self.model.config.vocab_size
    self._store, out = self._run.decode(
      self._variables,
      self._store,
      host_arrays.rows(going, bucket, [1] * len(going)),
      host_arrays.going(going, bucket, [limits[s] for s in going]),
      host_arrays.draws(going, bucket, self.page, vocab),
    )
    out = jax.device_get(out)
    self._totals['decode_calls'] += int(out.calls.max())
    for i, one in enumerate(going):
      rejected = drafts * int(out.calls[i]) - int(out.accepted[i])
      one.drafts[0] += int(out.accepted[i])
      one.drafts[1] += rejected
      self._totals['accepted_drafts'] += int(out.accepted[i])
      self._totals['drafts'] += drafts * int(out.calls[i])
    return failed + [self._advance(s, i, out) for i, s in enumerate(going)]

  def _advance(self, one: Sequence, row: int, out: Decoded) -> Event:
    """Takes what a row has drawn: its event."""
    count, drawn = int(out.count[row]), out.drawn
    if not drawn.sound[row, :count].all():
      return self._ended(
        one,
        'error',
        error='the model gave logits that are not finite for this request',
      )
    tokens, text, finish = [], '', None
    for token in map(int, drawn.token[row, :count]):
      tokens.append(token)
      one.buffer[one.length] = token
      one.length += 1
      one.cached += 1
      more, finish = self._read(one, token)
      text += more
      if finish:
        break
      if one.failure is not None:
        return self._failed(one)
    if out.experts is not None:
      chosen = out.experts[row, : len(tokens)]
      one.experts = _counted(one.experts, chosen, self.model)
    self._totals['tokens'] += len(tokens)
    self._keep(one)
    logprobs = ()
    if one.request.logprobs is not None:
      logprobs = _logprobs(drawn, row, len(tokens), one.request.logprobs)
    scores, one.scores = tuple(one.scores), []
    how = {'tokens': tuple(tokens), 'text': text, 'logprobs': logprobs}
    how['prompt_logprobs'] = scores
    if finish:
      return self._ended(one, finish, **how)
    return Event(one.id, one.index, **how)

  def _read(self, one: Sequence, token: int) -> tuple[str, Finish | None]:
    """Returns the text that is certain with a token, and whether it ends."""
    text, finish = '', None
    stops = token in one.request.sampling.stop
    if one.matcher is not None:
      stops |= not _accepts(one, token)
      stops |= one.matcher.ended
    if one.text is not None and not stops:
      text = one.text.feed(token).text
      stops = one.text.stopped
    if one.failure is not None:
      return '', None
    if stops:
      finish = 'stop'
    elif one.left <= 0:
      finish = 'length'
    if finish and one.text is not None:
      text += one.text.finish().text
    return text, finish

  def _failed(self, one: Sequence) -> Event:
    """Ends an answer whose grammar gave up, such as on a limit of its own."""
    return self._ended(one, 'error', error=one.failure)

  def _keep(self, one: Sequence) -> None:
    """Makes full pages known, and keeps the rings where that is worth it."""
    slot = self._scheduler.name(one)
    if slot is not None:
      self._store = _copied(self._store, one.slot, slot)

  def _ended(
    self, one: Sequence, finish: Finish, *, error: str | None = None, **how: Any
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
    return Event(
      one.id, one.index, finish=finish, error=error, usage=usage, **how
    )

  def _prefill(self) -> None:
    """Caches a chunk of the oldest prompts that aren't cached yet."""
    waiting = [s for s in self._scheduler.running if s.to_prefill]
    if not waiting:
      return
    shapes = self.cfg.chunk_buckets()
    most = shapes[-1][1]
    sizes = {s: self._chunk(s, most) for s in waiting}
    rows, tokens = next(
      (shape for shape in shapes if shape[1] >= sizes[waiting[0]]), shapes[-1]
    )
    some = waiting[:rows]
    counts = [min(self._chunk(s, tokens), tokens) for s in some]
    end = max(s.cached + n for s, n in zip(some, counts))
    bucket = Bucket(rows, tokens, self._pages(max(end, tokens)))
    echo = any(s.request.echo and not s.answered for s in some)
    self._store, scores, _ = self._run.prefill(
      self._variables,
      self._store,
      host_arrays.rows(some, bucket, counts),
      host_arrays.chunk(some, bucket, counts, self.cfg.drafts, echo),
    )
    self._totals['prefilled'] += sum(counts)
    if echo:
      scores = jax.device_get(scores)
    for i, (one, count) in enumerate(zip(some, counts)):
      if one.request.echo and not one.answered:
        self._score(one, i, count, scores)
      one.cached += count
      self._keep(one)

  def _chunk(self, one: Sequence, most: int) -> int:
    """Returns how many tokens of a sequence to cache next."""
    count = min(one.to_prefill, most)
    border = self._scheduler.border(one)
    if border is not None:
      count = min(count, border - one.cached)
    return count

  def _score(self, one: Sequence, row: int, count: int, scores: Any) -> None:
    """Notes the log-probabilities of the prompt's tokens in a chunk."""
    if not one.scores:
      one.scores = [None]
    wanted = one.request.logprobs or 0
    for t in range(count):
      token = int(one.buffer[one.cached + t + 1])
      logprob = float(scores.logprob[row, t])
      top = zip(scores.top[row, t, :wanted], scores.top_logprob[row, t])
      top = tuple((int(a), float(b)) for a, b in top)
      one.scores.append(LogProb(token, logprob, logprob, top))

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
    shapes = self._buckets()
    for number, (what, bucket) in enumerate(shapes, 1):
      begun = time.monotonic()
      self._compile(what, bucket)
      if say is not None:
        say(
          f'compiled {number}/{len(shapes)}: {what}, {bucket.rows} x'
          f' {bucket.tokens} tokens, context {bucket.pages * self.page}'
          f' ({time.monotonic() - begun:.1f} s)'
        )
    if self._paging.has_rings:
      self._store = _copied(self._store, 0, 0)

  def _buckets(self) -> list[tuple[str, Bucket]]:
    """Returns the shapes of all programs."""
    shapes = []
    for pages in self.cfg.page_buckets(self.page):
      for rows in self.cfg.row_buckets():
        shapes.append(('decode', Bucket(rows, 1, pages)))
      for rows, tokens in self.cfg.chunk_buckets():
        if tokens <= pages * self.page:
          shapes.append(('prefill', Bucket(rows, tokens, pages)))
    return shapes

  def _compile(self, what: str, bucket: Bucket) -> None:
    """Runs a program of one shape on padding."""
    where = host_arrays.rows([], bucket, [])
    if what == 'prefill':
      args = (host_arrays.chunk([], bucket, [], self.cfg.drafts),)
    else:
      vocab = self.model.config.vocab_size
      args = (
        host_arrays.going([], bucket, []),
        host_arrays.draws([], bucket, self.page, vocab),
      )
    run = getattr(self._run, what)
    self._store, *out = run(self._variables, self._store, where, *args)
    jax.block_until_ready(out)


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


@functools.partial(jax.jit, donate_argnums=0)
def _copied(store: Store, source: int, to: int) -> Store:
  """Returns the store with the rings of one slot in another, too."""
  copy = lambda a: a.at[:, to].set(a[:, source])
  return store._replace(slots=tuple(map(copy, store.slots)))


def _masked(one: Sequence) -> bool:
  """Notes what a sequence's grammar allows next; returns whether it could."""
  try:
    one.mask = one.matcher and one.matcher.mask()
  except InputError as error:
    one.failure = str(error)
  return one.failure is None


def _accepts(one: Sequence, token: int) -> bool:
  """Returns whether a sequence's grammar takes a token."""
  try:
    return one.matcher.accept(token)
  except InputError as error:
    one.failure = str(error)
    return True


def _beside(store: Store, variables: dict) -> Store:
  """Returns the store committed to the device that the variables are on.

  What a program gives back is, if any of its arguments was: the first shape
  would be compiled again for a store that came uncommitted. On several devices
  the mesh decides.
  """
  places = {d for a in jax.tree.leaves(variables) for d in a.devices()}
  if len(places) == 1 and any(a.committed for a in jax.tree.leaves(variables)):
    return jax.device_put(store, places.pop())
  return store


def _least(buckets: tuple[int, ...], need: int) -> int:
  """Returns the least bucket that is enough."""
  return next(b for b in buckets if b >= need)


def _counted(
  total: np.ndarray | None, chosen: np.ndarray, model: Model
) -> np.ndarray:
  """Returns counts [L E] with what some tokens chose, [T L K]."""
  layers = [layer.block.ffn for layer in model.config.in_order()]
  experts = max(f.experts for f in layers if hasattr(f, 'experts'))
  if total is None:
    total = np.zeros((chosen.shape[1], experts), np.int64)
  number = np.arange(chosen.shape[1])[:, None]
  np.add.at(total, (np.broadcast_to(number, chosen.shape), chosen), 1)
  return total


def _logprobs(
  drawn: sampler.Drawn, row: int, count: int, wanted: int
) -> tuple[LogProb, ...]:
  """Returns the log-probabilities of the first tokens of a row."""
  out = []
  for step in range(count):
    top = zip(drawn.top[row, step, :wanted], drawn.top_logprob[row, step])
    out.append(
      LogProb(
        int(drawn.token[row, step]),
        float(drawn.logprob[row, step]),
        float(drawn.sampled[row, step]),
        tuple((int(a), float(b)) for a, b in top),
      )
    )
  return tuple(out)
