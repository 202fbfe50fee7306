import itertools
import random

from absl.testing import absltest, parameterized

from deepseek_jax.data import tokenizer
from deepseek_jax.errors import InputError
from deepseek_jax.infer.detokenize import Detokenizer, Stops
from tests import tokenizer_folders as folders

TEXTS = (
  'Hello, world',
  'a👩‍👧‍👦b 🇫🇷 ✌🏽',
  '稀疏模型，漢字かな交じり문',
  'e\u0301 \ufeff\u2028\x00 \ufffd\ufffd',
  '',
)


def make(kind):
  if kind == 'bytes':
    return tokenizer.ByteTokenizer()
  model = getattr(folders, kind)()
  return tokenizer.Tokenizer(model.to_str(), eos='</s>', pad='<pad>')


def splits(text):
  """Yields every way to cut a text into pieces."""
  for cuts in itertools.product((0, 1), repeat=max(len(text) - 1, 0)):
    pieces = text[:1]
    for cut, letter in zip(cuts, text[1:]):
      pieces += ('\0' if cut else '') + letter
    yield pieces.split('\0')


def stopped(pieces, stops):
  found = Stops(stops)
  out = [found.feed(piece) for piece in pieces]
  return ''.join(out) + found.finish(), found.stopped


def first_stop(text, stops):
  """Returns the text before the stop that is complete first."""
  for end in range(len(text) + 1):
    sizes = [len(s) for s in stops if text[:end].endswith(s)]
    if sizes:
      return text[: end - max(sizes)], True
  return text, False


class StopsTest(parameterized.TestCase):
  @parameterized.parameters(
    ('abXYZcd', ['XYZ'], 'ab', True),
    ('XYaXYZ', ['XYZ'], 'XYa', True),
    ('XYaXYb', ['XYZ'], 'XYaXYb', False),
    ('XXYZ', ['XYZ'], 'X', True),
    ('aaab', ['aab'], 'a', True),
    ('ababac', ['abac'], 'ab', True),
    ('abcde', ['bcd', 'cd', 'd'], 'a', True),
    ('abcd', ['abcdx', 'bc'], 'a', True),
    ('a\n\nb', ['\n\n'], 'a', True),
    ('XY', ['XYZ'], 'XY', False),
    ('😀漢😀é', ['😀é'], '😀漢', True),
    ('', ['a'], '', False),
    ('abc', [], 'abc', False),
  )
  def test_every_split_gives_the_same(self, text, stops, want, found):
    self.assertEqual(first_stop(text, stops), (want, found))
    for pieces in splits(text):
      self.assertEqual(stopped(pieces, stops), (want, found), msg=str(pieces))
      self.assertEqual(stopped(['', *pieces, ''], stops), (want, found))

  def test_random_texts_and_stops(self):
    rng = random.Random(0)
    word = lambda most: ''.join(rng.choices('ab', k=rng.randrange(1, most)))
    for _ in range(3000):
      text, stops = word(14), [word(5) for _ in range(rng.randrange(1, 4))]
      cut = rng.randrange(len(text) + 1)
      want = first_stop(text, stops)
      self.assertEqual(stopped([text[:cut], text[cut:]], stops), want)
      self.assertEqual(stopped(list(text), stops), want)

  def test_no_more_than_a_beginning_waits(self):
    found = Stops(['XYZ', 'bX'])
    given = [found.feed(letter) for letter in 'aXYbXb']
    self.assertEqual(given, ['a', '', '', 'XY', '', ''])
    self.assertTrue(found.stopped)
    found = Stops(['XYZ'])
    self.assertEqual([found.feed(c) for c in 'XYa'], ['', '', 'XYa'])

  def test_nothing_comes_after_a_stop(self):
    found = Stops(['.'])
    self.assertEqual(found.feed('a.b'), 'a')
    self.assertEqual(found.feed('c'), '')
    self.assertEqual(found.finish(), '')

  def test_long_beginnings_of_long_stops_end(self):
    # Quadratic work would be 4e9 comparisons.
    found = Stops(['a' * 20000 + 'b'])
    text = ''.join(found.feed('a' * 100) for _ in range(2000)) + found.finish()
    self.assertEqual(text, 'a' * 200000)

  @parameterized.parameters(([''],), (['a', ''],), ('abc',), ([1],))
  def test_what_is_no_stop_text_is_named(self, stops):
    with self.assertRaisesRegex(InputError, '^stop = '):
      Stops(stops)


class DetokenizerTest(parameterized.TestCase):
  def run_all(self, tok, ids, **options):
    detokenizer = Detokenizer(tok, **options)
    deltas = [detokenizer.feed(i) for i in ids] + [detokenizer.finish()]
    tokens = [t for d in deltas for t in d.tokens]
    return ''.join(d.text for d in deltas), tokens, detokenizer, deltas

  @parameterized.parameters('bytes', 'byte_level', 'sentencepiece')
  def test_deltas_are_the_text_and_every_token_comes_once(self, kind):
    tok, rng = make(kind), random.Random(1)
    rows = [tok.encode(text) for text in TEXTS]
    # Lone bytes: beginnings, middles and ends of characters.
    rows += [ids[a:b] for ids in rows for a in (1, 2) for b in (-1, -2)]
    top = tok.vocab_size + 3  # a model's vocabulary may be larger
    rows += [
      [rng.randrange(top) for _ in range(rng.randrange(1, 24))]
      for _ in range(300)
    ]
    for ids in rows:
      text, tokens, _, _ = self.run_all(tok, ids)
      self.assertEqual(text, tok.decode(ids))
      self.assertEqual(tokens, ids)

  @parameterized.parameters('bytes', 'byte_level')
  def test_a_token_comes_with_the_text_that_ends_it(self, kind):
    tok = make(kind)
    for text in TEXTS:
      ids = tok.encode(text)
      detokenizer, given, covered = Detokenizer(tok), '', []
      for token in ids:
        delta = detokenizer.feed(token)
        given += delta.text
        covered += delta.tokens
        # What was given is the text of the tokens that came, all of it, but
        # for whole characters of a token that ends inside one.
        whole = tok.decode(covered)
        self.assertTrue(given.startswith(whole))
        self.assertLess(len(given) - len(whole), 4)

  def test_a_split_character_waits_with_its_tokens(self):
    tok = make('bytes')
    ids = tok.encode('a€b')
    _, _, _, deltas = self.run_all(tok, ids)
    self.assertEqual([d.text for d in deltas], ['a', '', '', '€', 'b', ''])
    self.assertEqual([len(d.tokens) for d in deltas], [1, 0, 0, 3, 1, 0])

  def test_a_stop_text_over_tokens(self):
    tok = make('bytes')
    for text, want in (('abXYZcd', 'ab'), ('XYaXYZ', 'XYa')):
      ids = tok.encode(text)
      got, tokens, detokenizer, deltas = self.run_all(tok, ids, stop=['XYZ'])
      self.assertEqual(got, want)
      self.assertTrue(detokenizer.stopped)
      # Those up to the one that completed it, and none twice.
      self.assertEqual(tokens, ids[: text.index('XYZ') + 3])
      self.assertEqual(deltas[-1], ('', ()))

  def test_what_waits_for_a_stop_text_comes_with_its_tokens(self):
    tok = make('bytes')
    ids = tok.encode('aXYb')
    _, tokens, _, deltas = self.run_all(tok, ids, stop=['XYZ'])
    self.assertEqual([d.text for d in deltas], ['a', '', '', 'XYb', ''])
    self.assertEqual([len(d.tokens) for d in deltas], [1, 0, 0, 3, 0])
    self.assertEqual(tokens, ids)
    got, tokens, detokenizer, _ = self.run_all(tok, ids[:3], stop=['XYZ'])
    self.assertEqual((got, tokens), ('aXY', ids[:3]))
    self.assertFalse(detokenizer.stopped)

  def test_a_stop_text_of_broken_bytes_and_emoji(self):
    tok = make('bytes')
    ids = tok.encode('x👩‍👧y')
    for cut in range(len(ids)):
      got, _, _, _ = self.run_all(tok, ids[:cut] + ids[cut:], stop=['👧'])
      self.assertEqual(got, 'x👩‍')
    got, _, _, _ = self.run_all(tok, ids[1:3], stop=['\ufffd'])
    self.assertEqual(got, '')

  def test_goes_on_from_a_prompt(self):
    tok = make('sentencepiece')
    prompt, ids = tok.encode('the'), tok.encode('h')
    got, _, _, _ = self.run_all(tok, ids, after=prompt)
    self.assertEqual(got, ' h')


if __name__ == '__main__':
  absltest.main()
