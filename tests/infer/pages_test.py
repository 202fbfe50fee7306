"""Pages: nobody's page is given twice, and equal beginnings are found."""

import collections

import numpy as np
from absl.testing import absltest

from deepseek_jax.infer.pages import Pages, Snapshots, chain


class ChainTest(absltest.TestCase):
  def test_a_hash_rests_on_all_tokens_before(self):
    tokens = np.arange(40)
    whole = chain(tokens, 8, 'a')
    self.assertLen(set(whole), 5)
    self.assertEqual(chain(tokens[:23], 8, 'a'), whole[:2])
    self.assertEqual(chain(tokens, 8, 'a', whole[:3]), whole)
    other = tokens.copy()
    other[3] = 99
    self.assertTrue(all(a != b for a, b in zip(whole, chain(other, 8, 'a'))))
    self.assertTrue(all(a != b for a, b in zip(whole, chain(tokens, 8, 'b'))))

  def test_it_may_rest_on_the_token_after_a_page(self):
    tokens = np.arange(40)
    whole = chain(tokens, 8, 'a', ahead=1)
    # The last page has no token after it.
    self.assertLen(set(whole), 4)
    self.assertEqual(chain(tokens[:25], 8, 'a', ahead=1), whole[:3])
    self.assertEqual(chain(tokens[:24], 8, 'a', ahead=1), whole[:2])
    self.assertEqual(chain(tokens, 8, 'a', whole[:2], ahead=1), whole)
    other = tokens.copy()
    other[16] = 99
    found = chain(other, 8, 'a', ahead=1)
    self.assertEqual([a == b for a, b in zip(whole, found)], [1, 0, 0, 0])

  def test_no_page_has_the_hash_of_another_split(self):
    # The same tokens in pages of another size.
    tokens = np.zeros(64, np.int32)
    self.assertNotEqual(chain(tokens, 8, '')[1], chain(tokens, 16, '')[0])


class PagesTest(absltest.TestCase):
  def test_random_use_never_gives_a_page_to_two(self):
    rng = np.random.default_rng(0)
    pages, users = Pages(12), []
    names = {}
    for step in range(4000):
      if users and rng.random() < 0.5:
        pages.release(users.pop(rng.integers(len(users))))
      else:
        digest = bytes([rng.integers(6)])
        found = pages.found([digest])
        pages.share(found)
        more = pages.take(int(rng.integers(1, 4)))
        if more is None:
          pages.release(found)
          continue
        self.assertEmpty(set(found) & set(more))
        if not found:
          pages.name(more[0], digest)
        users.append(found + more)
      if step % 500 == 499:
        pages.forget()
      count = collections.Counter(p for user in users for p in set(user))
      own = [p for user in users for p in user]
      self.assertNotIn(0, own)
      # A page of several users is one that was found by its name.
      for page, times in count.items():
        if times > 1:
          names.setdefault(page, True)
      self.assertEqual(pages.free, 12 - len(count))
    for user in users:
      pages.release(user)
    self.assertEqual(pages.free, 12)
    self.assertTrue(names)

  def test_the_longest_unused_page_goes_first(self):
    pages = Pages(3)
    for digest in (b'a', b'b', b'c'):
      [page] = pages.take(1)
      pages.name(page, digest)
      pages.release([page])
    pages.share(pages.found([b'a']))  # used again
    pages.release(pages.found([b'a']))
    pages.take(1)
    known = [d for d in (b'a', b'b', b'c') if pages.found([d])]
    self.assertEqual(known, [b'a', b'c'])

  def test_too_few_pages_give_none_and_take_none(self):
    pages = Pages(3)
    self.assertIsNone(pages.take(4))
    self.assertEqual(pages.free, 3)

  def test_what_is_forgotten_is_not_found(self):
    pages = Pages(2)
    mine = pages.take(1)
    pages.name(mine[0], b'x')
    pages.forget()
    self.assertEmpty(pages.found([b'x']))
    pages.release(mine)
    self.assertEqual(pages.free, 2)


class SnapshotsTest(absltest.TestCase):
  def test_the_longest_unused_is_given_up(self):
    kept = Snapshots([7, 8])
    first, second = kept.take(b'a'), kept.take(b'b')
    self.assertEqual({first, second}, {7, 8})
    self.assertIsNone(kept.take(b'a'))  # known already
    self.assertEqual(kept.found(b'a'), first)
    self.assertEqual(kept.take(b'c'), second)
    self.assertIsNone(kept.found(b'b'))

  def test_none_are_kept_without_room(self):
    self.assertIsNone(Snapshots([]).take(b'a'))


if __name__ == '__main__':
  absltest.main()
