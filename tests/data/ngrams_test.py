"""Engram's hash against integers of any size; classes and documents by hand."""

import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.data import ByteTokenizer, ngrams


def by_integers(window, how):
  """Rows of one token's window [N], for every layer, in plain Python."""
  out = []
  for factors, tables in zip(how.multipliers.tolist(), how.primes.tolist()):
    first, layer = 0, []
    for order in range(2, len(factors) + 1):
      mixed = 0
      for c, m in zip(window[:order], factors):
        mixed ^= int(c) * m
      for p in tables[order - 2]:
        layer.append(mixed % p + first)
        first += p
    out.append(layer)
  return out


class HashTest(parameterized.TestCase):
  @parameterized.parameters((20, 9), (2**17, 99092), (2**27, 2**31 - 1))
  def test_rows_equal_those_of_big_integers(self, base, classes):
    how = ngrams.Hash(
      ngrams.multipliers((1, 14), 4, classes, seed=3),
      ngrams.primes(base, 2, 3, 2),
    )
    window = np.random.default_rng(0).integers(0, classes, (2, 50, 4))
    window[0, 0] = classes - 1  # the largest products
    got = ngrams.rows(window, how)
    self.assertEqual(got.shape, (2, 50, 2, 6))
    for b, t in np.ndindex(2, 50):
      self.assertEqual(got[b, t].tolist(), by_integers(window[b, t], how))

  def test_multipliers_are_the_published_draw_of_each_layer(self):
    classes, seed = 99092, 7
    got = ngrams.multipliers((1, 14), 3, classes, seed)
    for row, layer in zip(got, (1, 14)):
      draw = np.random.default_rng(seed + 10007 * layer)
      bound = ((2**63 - 1) // classes) // 2
      want = 2 * draw.integers(0, bound, 3, np.int64) + 1
      self.assertEqual(row.tolist(), want.tolist())
    self.assertTrue((got % 2 == 1).all())
    self.assertLess(int(got.max()) * (classes - 1), 2**63)
    self.assertFalse(np.array_equal(got[0], got[1]))

  def test_tables_of_v4_1_have_the_published_rows(self):
    sizes = ngrams.primes(16_000_000, 2, 3, 8)
    self.assertEqual(
      sizes.reshape(2, -1).sum(axis=1).tolist(), [384_006_168, 384_016_682]
    )

  def test_sizes_are_the_next_unused_primes(self):
    by_hand = [11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53]
    got = ngrams.primes(10, 2, 3, 2)
    self.assertEqual(got.reshape(-1).tolist(), by_hand)
    self.assertEqual(ngrams.primes(11, 1, 1, 1).tolist(), [[[11]]])

  def test_primes_are_told_from_all_other_numbers(self):
    divides = lambda n: any(n % d == 0 for d in range(2, int(n**0.5) + 1))
    for start in (0, 2**24, 2**31 - 300):
      for n in range(max(start, 2), start + 250):
        self.assertEqual(ngrams.is_prime(n), not divides(n), n)
    self.assertFalse(ngrams.is_prime(1))
    # Strong pseudoprimes to base 2, and to bases 2 and 3.
    for n in (2047, 1373653):
      self.assertFalse(ngrams.is_prime(n))

  def test_each_table_has_rows_of_its_own(self):
    sizes = ngrams.primes(5, 2, 2, 3)
    first = ngrams.offsets(sizes)
    for layer in range(2):
      flat = sizes[layer].reshape(-1).tolist()
      want = [sum(flat[:i]) for i in range(6)]
      self.assertEqual(first[layer].reshape(-1).tolist(), want)


class LookBackTest(parameterized.TestCase):
  def test_sees_its_own_document_alone(self):
    rng = np.random.default_rng(0)
    classes = rng.integers(1, 9, (3, 12))
    segments = np.array([[1] * 5 + [2] + [3] * 6, [1] * 12, [4] * 9 + [0] * 3])
    positions = np.array(
      [[*range(5), 0, *range(6)], range(12), [*range(9), *range(9, 12)]]
    )
    got = ngrams.look_back(classes, positions, segments, 4)
    for b, t, k in np.ndindex(3, 12, 4):
      inside = t >= k and segments[b, t] == segments[b, t - k]
      want = classes[b, t - k] if inside else ngrams.PAD
      self.assertEqual(got[b, t, k], want, (b, t, k))

  def test_a_window_shorter_than_the_n_gram_is_padded(self):
    one = np.ones((1, 2), int)
    got = ngrams.look_back(one * 5, np.array([[0, 1]]), one, 4)
    self.assertEqual(got.tolist(), [[[5, 0, 0, 0], [5, 5, 0, 0]]])

  def test_the_pipelines_rows_are_int32_of_the_tokens_classes(self):
    how = ngrams.Hash(
      ngrams.multipliers((0,), 2, 4, 0), ngrams.primes(50, 1, 1, 3)
    )
    classes = np.array([0, 1, 2, 1, 3], np.int32)
    tokens = np.array([[4, 1, 3, 2]], np.int32)
    ones, at = np.ones_like(tokens), np.arange(4)[None]
    got = ngrams.NGrams(classes, how)(tokens, ones, at)
    self.assertEqual((got.dtype, got.shape), (np.int32, (1, 4, 1, 3)))
    windows = [(3, 0), (1, 3), (1, 1), (2, 1)]
    for t, window in enumerate(windows):
      self.assertEqual(got[0, t].tolist(), by_integers(window, how))


class Pieces:
  """A tokenizer of given pieces."""

  def __init__(self, *pieces, pad_id):
    self.pieces, self.pad_id = pieces, pad_id
    self.vocab_size = len(pieces)

  def decode(self, ids):
    return ''.join(self.pieces[i] for i in ids)


class ClassesTest(parameterized.TestCase):
  @parameterized.parameters(
    ('Café', 'cafe'),
    ('  The', 'the'),
    ('ﬁne', 'fine'),  # a ligature
    ('a \t\n b', 'a b'),
    ('\t\t', ' '),
    ('', ''),
    ('١', '١'),  # no compatibility form
    ('अः', 'अ'),  # a mark that has a width
    ('a\u20dd', 'a'),  # one that encloses
    ('\u0301', '\u0301'),  # nothing would be left
    ('\u00a0', ' '),
    ('\u000b', '\u000b'),
    ('a\u000bb', 'a\u000bb'),
    (' \u2028x', 'x'),
  )
  def test_normalized_text(self, text, want):
    self.assertEqual(ngrams.normalized(text), want)

  def test_tokens_that_differ_in_case_or_spacing_share_a_class(self):
    pieces = Pieces('The', ' the', 'tHé', '<pad>', ' ', '\n', 'x', pad_id=3)
    got = ngrams.token_classes(pieces, 9).tolist()
    self.assertEqual(got, [1, 1, 1, 0, 2, 2, 3, 0, 0])

  def test_accents_alone_stay_apart(self):
    pieces = Pieces('<pad>', '\u0301', '\u0300', 'e\u0301', 'E', pad_id=0)
    self.assertEqual(ngrams.token_classes(pieces, 5).tolist(), [0, 1, 2, 3, 3])

  def test_bytes_of_characters_stay_apart(self):
    tokenizer = ByteTokenizer()
    got = ngrams.token_classes(tokenizer, tokenizer.vocab_size)
    first = tokenizer.vocab_size - 256
    text = lambda byte: got[first + byte]
    self.assertEqual(got[tokenizer.pad_id], ngrams.PAD)
    self.assertEqual(text(ord('A')), text(ord('a')))
    self.assertEqual(text(ord(' ')), text(ord('\n')))
    self.assertLen(set(got[first + 128 :].tolist()), 128)
    self.assertEqual(sorted(set(got.tolist())), list(range(got.max() + 1)))


if __name__ == '__main__':
  absltest.main()
