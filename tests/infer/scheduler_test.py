"""The scheduler: in any order of events nothing is lost, shared or starved."""

import collections

import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.infer.request import Request
from deepseek_jax.infer.scheduler import Scheduler, Sequence

PAGE, CONTEXT = 4, 48
CHUNKS = (1, 1), (3, 4), (1, 8)  # rows, tokens


def sequence(number, prompt, new, salt=''):
  """A sequence as the engine makes it; its settings are of no account."""
  buffer = np.zeros(CONTEXT, np.int32)
  buffer[: len(prompt)] = prompt
  request = Request(tuple(prompt), new)
  return Sequence(request, number, 0, None, buffer, len(prompt), salt)


class Play:
  """Plays what the engine does, with tokens and cached contents made up.

  A page, and a slot of rings, holds the tokens that were written there: what
  a sequence reads must be its own beginning. With drafts a page holds of each
  token the one after it, too, written with that one.
  """

  def __init__(self, pages, slots, snapshots, *, rings, reuse=True, ahead=0):
    self.schedule = Scheduler(
      PAGE,
      pages,
      slots,
      snapshots=snapshots,
      reuse=reuse,
      rings=rings,
      ahead=ahead,
    )
    self.slots, self.rings, self.ahead = slots, rings, ahead
    self.pages = np.full((pages + 1, PAGE), -1)
    self.after = self.pages.copy()
    self.ring = {}  # slot -> all tokens that it stands for
    self.ended = []

  def write(self, one, count):
    """Caches the next tokens of a sequence."""
    own = one.buffer[: one.cached]
    held = self.pages[one.pages].reshape(-1)[: one.cached]
    np.testing.assert_array_equal(held, own)
    if self.rings and one.cached:
      np.testing.assert_array_equal(self.ring[one.slot], own)
    for place in range(one.cached, one.cached + count):
      page = one.pages[place // PAGE]
      self.pages[page, place % PAGE] = one.buffer[place]
    if self.ahead:
      self.write_after(one, count)
    one.cached += count
    self.ring[one.slot] = one.buffer[: one.cached].copy()
    slot = self.schedule.name(one)
    if slot is not None:
      assert slot >= self.slots
      self.ring[slot] = self.ring[one.slot].copy()

  def write_after(self, one, count):
    """Caches what rests on the tokens after, of all but the last token."""
    last = max(one.cached - 1, 0)
    held = self.after[one.pages].reshape(-1)[:last]
    np.testing.assert_array_equal(held, one.buffer[1 : 1 + last])
    for place in range(last, one.cached + count - 1):
      page = one.pages[place // PAGE]
      self.after[page, place % PAGE] = one.buffer[place + 1]

  def step(self, rng):
    """One step of the engine; returns whether anything went on."""
    schedule = self.schedule
    for one, snapshot in schedule.admit():
      if snapshot is not None:
        self.ring[one.slot] = self.ring[snapshot].copy()
    moved = False
    limits = {}
    for one in [s for s in schedule.running if not s.to_prefill]:
      if one.slot is None:
        continue
      limit = min(int(rng.integers(1, 6)), one.left)
      border = schedule.border(one)
      if border is not None:
        limit = min(limit, border - one.cached)
      assert limit > 0
      if schedule.grow(one, one.cached + limit):
        limits[one] = limit
    for one, limit in limits.items():
      if one.slot is None:
        continue
      moved = True
      for token in rng.integers(0, 3, limit):
        one.buffer[one.length] = token
        one.length += 1
      self.write(one, limit)
      if one.left <= 0:
        schedule.end(one)
        self.ended.append(one)
    oldest = [s for s in schedule.running if s.to_prefill][:1]
    some, (_, tokens) = schedule.next_chunk(CHUNKS)
    assert some[:1] == oldest
    for one in some:
      moved = True
      self.write(one, schedule.chunk(one, tokens))
    return moved

  def check(self):
    """Checks what must always hold."""
    schedule = self.schedule
    using = collections.Counter(p for s in schedule.running for p in s.pages)
    assert 0 not in using
    assert schedule.pages.free == schedule.pages.total - len(using)
    slots = [s.slot for s in schedule.running]
    assert sorted(slots + schedule._slots) == list(range(self.slots))
    order = [s.id for s in (*schedule.running, *schedule.waiting)]
    assert order == sorted(order), order
    for one in schedule.waiting:
      assert one.slot is None and not one.pages and not one.cached
    for one in schedule.running:
      assert one.cached <= one.length - 1
      assert len(one.pages) * PAGE >= one.cached


class SimulationTest(parameterized.TestCase):
  @parameterized.product(
    seed=(0, 1, 2), rings=(False, True), reuse=(False, True), ahead=(0, 1)
  )
  def test_any_order_of_events_keeps_pages_slots_and_order(
    self, seed, rings, reuse, ahead
  ):
    rng = np.random.default_rng(seed)
    how = {'rings': rings, 'reuse': reuse, 'ahead': ahead}
    play = Play(14, 4, 3 if reuse else 0, **how)
    schedule, made, cancelled, idle = play.schedule, 0, 0, 0
    for _ in range(600):
      event = rng.random()
      if event < 0.35 and len(schedule.waiting) < 8:
        size = int(rng.integers(1, 40))
        # Few tokens: many begin alike.
        prompt = np.minimum(rng.integers(0, 9, size), 1)
        new = int(rng.integers(1, CONTEXT - size + 4))
        schedule.waiting.append(
          sequence(made, prompt, new, salt=str(rng.integers(2)))
        )
        made += 1
      elif event < 0.4:
        some = [*schedule.running, *schedule.waiting]
        if some:
          schedule.end(some[rng.integers(len(some))])
          cancelled += 1
      elif event < 0.41:
        schedule.forget()
        play.pages[:] = play.after[:] = -1
        play.check()
        self.assertEmpty(schedule.running)
      busy = bool(schedule.running or schedule.waiting)
      idle = idle + 1 if busy and not play.step(rng) else 0
      # A step that moves nobody would be repeated for ever.
      self.assertLess(idle, 2)
      play.check()
    for _ in range(2000):
      if not (schedule.running or schedule.waiting):
        break
      play.step(rng)
      play.check()
    self.assertEqual(len(play.ended) + cancelled, made)
    self.assertEqual(schedule.pages.free, 14)
    self.assertGreater(schedule.preempted, 0)

  @parameterized.parameters(False, True)
  def test_the_oldest_is_never_disturbed(self, rings):
    # Two that need all pages: the older one ends first, without a break.
    play = Play(12, 2, 2, rings=rings)
    rng = np.random.default_rng(0)
    old, new = sequence(0, [1] * 8, 40), sequence(1, [2] * 8, 40)
    play.schedule.waiting.extend((old, new))
    while len(play.ended) < 2:
      before = old.length
      self.assertTrue(play.step(rng))
      play.check()
      if old not in play.ended:
        self.assertIsNotNone(old.slot)
        self.assertGreaterEqual(old.length, before)
    self.assertEqual([s.id for s in play.ended], [0, 1])
    self.assertEqual(old.answered, 40)
    self.assertEqual(new.answered, 40)


class NameTest(absltest.TestCase):
  def test_a_page_that_rests_on_the_token_after_is_known_with_it(self):
    schedule = Scheduler(PAGE, 9, 2, snapshots=2, rings=True, ahead=1)
    found = lambda tokens: schedule._prefix(sequence(9, tokens, 1))
    one = sequence(0, range(1, 11), 3)
    schedule.waiting.append(one)
    schedule.admit()
    one.cached = 8
    # Its rings are those of now; it may end before the page is whole.
    slot = schedule.name(one)
    self.assertEqual(found(range(1, 11)), ([], None))
    one.cached = 9
    self.assertIsNone(schedule.name(one))
    self.assertEqual(found(range(1, 11)), (one.pages[:2], slot))
    # Another token after it is another page.
    self.assertEqual(found([*range(1, 9), 10]), ([], None))


class ChunkTest(parameterized.TestCase):
  @parameterized.parameters(
    ((), 0, (1, 1)),
    ((2,), 1, (1, 1)),  # all but its last token
    ((9,), 1, (1, 8)),
    ((4, 3), 2, (3, 4)),
    ((13, 2), 1, (1, 8)),  # 8 of the older one alone, not 4 and 1
    ((5, 5, 5, 5), 3, (3, 4)),
  )
  def test_the_chunk_that_caches_most_is_next(self, prompts, rows, shape):
    schedule = Scheduler(PAGE, 40, 8, reuse=False)
    waiting = [sequence(i, [1] * n, 3) for i, n in enumerate(prompts)]
    schedule.waiting.extend(waiting)
    schedule.admit()
    self.assertEqual(schedule.next_chunk(CHUNKS), (waiting[:rows], shape))


if __name__ == '__main__':
  absltest.main()
