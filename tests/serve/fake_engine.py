"""An engine that computes nothing: it says what a script tells it to say."""

import dataclasses
import math
import random
import threading
import time
from collections import deque

import numpy as np

from deepseek_jax.errors import InputError
from deepseek_jax.infer.detokenize import Stops
from deepseek_jax.infer.engine import EngineBusy
from deepseek_jax.infer.request import Event, LogProb, Usage


@dataclasses.dataclass
class _Row:
  """One answer under way."""

  request: int
  index: int
  asked: object
  says: deque
  text: object
  stops: Stops
  made: int = 0
  cancelled: bool = False


class FakeEngine:
  """Has the face of the engine; an answer gets `at_once` tokens a step.

  Attributes:
    script: (request, index) -> tokens that it says; by default the prompt
      again, and again, with a stop token at its end.
    hold: while set, steps give nothing.
    pace: seconds of a step.
    at_once: tokens of an answer in a step's event; the last step has fewer.
    fails: raised by the next step.
    nan: prompts that begin with this token fail.
    seen: requests as they came.
  """

  def __init__(self, tokenizer, *, context=256, slots=4, queue=64, stop=1):
    self.tokenizer, self.context, self.stop = tokenizer, context, stop
    self.slots, self.queue = slots, queue
    self.script = None
    self.hold = threading.Event()
    self.pace, self.at_once = 0.0, 1
    self.fails, self.nan = None, None
    self.seen, self.threads = [], set()
    self._rows, self._waiting = [], deque()
    self._next = 0
    self.stats = {'steps': 0, 'tokens': 0, 'pages': 100, 'pages_free': 100}
    self.most_running = 0

  def warm_up(self, say=None):
    self.threads.add(threading.get_ident())
    if say:
      say('compiled 1 of 1')

  def submit(self, request):
    self.threads.add(threading.get_ident())
    if len(request.prompt) >= self.context:
      raise InputError(f'prompt: has {len(request.prompt)} tokens')
    if len(self._waiting) + request.n > self.queue:
      raise EngineBusy('queue: is full')
    number, self._next = self._next, self._next + 1
    self.seen.append(request)
    for index in range(request.n):
      text = self.tokenizer.decoder(request.prompt)
      stops = Stops(request.stop_strings)
      says = deque(self._says(request, index))
      row = _Row(number, index, request, says, text, stops)
      self._waiting.append(row)
    self._count()
    return number

  def _says(self, request, index):
    if self.script is not None:
      return self.script(request, index)
    if request.sampling.temperature == 0:
      return [*request.prompt, self.stop]
    draw = random.Random(request.sampling.seed + index)
    return [draw.choice(request.prompt) for _ in range(9)] + [self.stop]

  def cancel(self, request):
    self.threads.add(threading.get_ident())
    for row in [*self._rows, *self._waiting]:
      if row.request == request:
        row.cancelled = True

  def busy(self):
    return bool(self._rows or self._waiting)

  def step(self):
    self.threads.add(threading.get_ident())
    if self.fails:
      raise self.fails
    time.sleep(0.002 if self.hold.is_set() else self.pace)
    while self._waiting and len(self._rows) < self.slots:
      self._rows.append(self._waiting.popleft())
    rows = [*self._rows, *(r for r in self._waiting if r.cancelled)]
    events = [self._events(row) for row in rows]
    ended = {(e.request, e.index) for e in events if e is not None and e.finish}
    going = lambda r: (r.request, r.index) not in ended
    self._rows = [r for r in self._rows if going(r)]
    self._waiting = deque(r for r in self._waiting if going(r))
    self._count()
    return [e for e in events if e is not None]

  def _count(self):
    used = len(self._rows) + len(self._waiting)
    self.most_running = max(self.most_running, used)
    self.stats = self.stats | {
      'steps': self.stats['steps'] + 1,
      'pages_free': 100 - used,
      'running': len(self._rows),
      'waiting': len(self._waiting),
    }

  def _events(self, row):
    found = self._event(row)
    for _ in range(self.at_once - 1):
      if found is None or found.finish:
        break
      more = self._event(row)
      if more is None:
        break
      found = dataclasses.replace(
        more,
        tokens=found.tokens + more.tokens,
        text=found.text + more.text,
        logprobs=found.logprobs + more.logprobs,
        prompt_logprobs=found.prompt_logprobs,
      )
    return found

  def _event(self, row):
    make = lambda **more: Event(row.request, row.index, **more)
    usage = lambda: Usage(len(row.asked.prompt), 1, row.made)
    if row.cancelled:
      return make(finish='cancelled', usage=usage())
    if self.nan is not None and row.asked.prompt[0] == self.nan:
      return make(finish='error', error='logits are NaN', usage=usage())
    if self.hold.is_set():
      return None
    token = row.says.popleft() if row.says else self.stop
    row.made += 1
    ends = token in row.asked.sampling.stop
    text = '' if ends else row.stops.feed(row.text.feed(token))
    finish = None
    if ends or row.stops.stopped:
      finish = 'stop'
    elif row.made == row.asked.max_new_tokens:
      finish = 'length'
    if finish:
      text += row.stops.feed(row.text.finish()) + row.stops.finish()
    told, before = (), ()
    if row.asked.logprobs is not None:
      told = (self._told(token, row.asked.logprobs),)
      if row.asked.echo and row.made == 1:
        rest = row.asked.prompt[1:]
        before = (None, *(self._told(t, row.asked.logprobs) for t in rest))
    return make(
      tokens=(token,),
      text=text,
      logprobs=told,
      finish=finish,
      usage=usage() if finish else None,
      prompt_logprobs=before,
    )

  def _told(self, token, k):
    top = tuple((t, -float(i + 1)) for i, t in enumerate(range(5, 5 + k)))
    value = -math.inf if token == 7 else -0.5 - token / 1000
    return LogProb(token, value, -0.25, top)

  def expert_load(self, request):
    return np.arange(6).reshape(2, 3) + request * 0
