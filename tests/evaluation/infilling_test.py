"""Holes in functions: where they are, what fills them, what is no function."""

import json
import shutil
import tempfile
from pathlib import Path

from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax.evaluation import infilling
from tests.rl import taught

CODE = '''
import os


@property
def first(a):
  """Adds."""

  b = a + 1
  return b


class Holder:
  x = 1

  async def second(self):
    return self.x

  def third(self): return 3


def far(): return 'naïve'
'''


class FunctionsTest(absltest.TestCase):
  def test_functions_of_modules_and_classes_are_found_once(self):
    found = infilling.functions([CODE, CODE, 'def broken(:', 'x = 1', 'a\0b'])
    names = [t.split('(')[0].split()[-1] for t in found.texts]
    self.assertEqual(names, ['first', 'far', 'second', 'third'])
    self.assertEqual((found.documents, found.unparsed), (5, 2))
    for text in found.texts:
      self.assertIn(text, CODE)
    paged = infilling.functions(['\x0c\nx = "\x1c\u2028"\r\ndef f(): pass\r\n'])
    self.assertEqual(paged.texts, ('def f(): pass\r\n',))
    short = infilling.functions([CODE], most=40).texts
    self.assertLess(max(map(len, short)), 41)
    self.assertLess(len(short), 4)

  def test_a_line_is_cut_out_and_parts_make_the_whole(self):
    text = infilling.functions([CODE]).texts[0]
    seen = set()
    for seed in range(40):
      made = infilling.cut(text, 'line', seed)
      self.assertEqual(''.join(made), text)
      self.assertEqual(made, infilling.cut(text, 'line', seed))
      seen.add(made.mid)
    lines = {line.strip() for line in text.splitlines()[1:] if line.strip()}
    self.assertEqual(seen, lines)
    self.assertIsNone(infilling.cut('def f(): return 3\n', 'line', 0))

  def test_random_holes_are_those_of_training(self):
    text = infilling.functions([CODE]).texts[0]
    made = [infilling.cut(text, 'random', seed) for seed in range(40)]
    made = [m for m in made if m]
    self.assertTrue(all(''.join(m) == text and m.mid for m in made))
    self.assertGreater(len(set(made)), 20)


class InfilledTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.folder)

  def infilled(self, name='a.jsonl', texts=(CODE,), ks=(1,), **changes):
    path = Path(self.folder, name)
    more = {n: changes.pop(n) for n in ('limit', 'span') if n in changes}
    found = infilling.functions(texts)
    return path, infilling.infilled(
      taught.asked(), found, taught.sampled(**changes), ks, path, **more
    )

  def test_prompts_are_those_of_training(self):
    made = infilling.cut(infilling.functions([CODE]).texts[0], 'line', 3)
    asked = taught.asked()
    ids = infilling._prompt(asked, made)
    encode = asked.tokenizer.encode
    self.assertEqual(ids, [2, *encode(made.pre), 3, *encode(made.suf), 4])

  def test_only_the_very_text_is_right(self):
    # What the model writes, put where the holes are: then it is right.
    path, found = self.infilled(n=2)
    self.assertEqual(found['pass']['1']['value'], 0.0)
    self.assertEqual(found['problems'], 2)  # of four two have more than a line
    rows = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    answers = {row['middle']: row for row in rows}
    self.assertLen(answers, 2)

    class Knowing:
      """An engine that knows some middles."""

      def __init__(self, middles):
        self.middles = middles

      def run(self, requests):
        tokenizer = taught.asked().tokenizer
        out = []
        for _, middle in zip(requests, self.middles):
          ids = (*tokenizer.encode(middle), tokenizer.eos_id)
          cut = tuple(tokenizer.encode(middle))
          out.append([_answer(ids, 'stop'), _answer(cut, 'length')])
        return out

    middles = [row['middle'] for row in rows]
    with absltest.mock.patch.object(
      infilling.answering, 'engine_of', lambda *_: Knowing(middles)
    ):
      _, found = self.infilled('b.jsonl', n=2, ks=(1, 2))
    # One that ran into the limit might have gone on.
    self.assertEqual(found['pass']['1']['value'], 0.5)
    self.assertEqual(found['pass']['2']['value'], 1.0)
    self.assertEqual(found['unfinished'], 0.5)

  def test_it_goes_on_where_it_ended(self):
    path, found = self.infilled(span='random', n=1)
    lines = path.read_bytes().splitlines(keepends=True)
    other = Path(self.folder, 'b.jsonl')
    other.write_bytes(b''.join(lines[:2]))
    _, again = self.infilled('b.jsonl', span='random', n=1)
    self.assertEqual(again, found)
    self.assertEqual(other.read_bytes(), path.read_bytes())
    _, few = self.infilled('c.jsonl', span='random', n=1, limit=1)
    self.assertEqual(few['problems'], 1)

  def test_what_does_not_fit_is_refused(self):
    with self.assertRaisesRegex(
      ds.InputError, 'no Python function is in 1 doc'
    ):
      self.infilled(texts=('x = 1',))
    with self.assertRaisesRegex(ds.InputError, 'has a line to cut out'):
      self.infilled(texts=('def f(): return 3\n',))
    with self.assertRaisesRegex(ds.InputError, 'k = 9: must lie in'):
      self.infilled(ks=(9,))
    source = taught.asked()

    class Bare:
      fim = None
      encode = source.tokenizer.encode

    with self.assertRaisesRegex(ds.InputError, 'no fill-in-the-middle marks'):
      infilling.check(
        source._replace(tokenizer=Bare()), infilling.functions([CODE])
      )


def _answer(tokens, finish):
  return ds.Answer(tokens, '', (), finish, None, None)


if __name__ == '__main__':
  absltest.main()
