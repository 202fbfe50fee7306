import json
import os
import sysconfig
import tempfile
from unittest import mock

import numpy as np
import pyarrow
import pyarrow.parquet
from absl.testing import absltest, parameterized

from deepseek_jax.data import corpus
from deepseek_jax.errors import InputError


class CorpusTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = self.enterContext(tempfile.TemporaryDirectory())

  def write(self, name, content):
    path = os.path.join(self.root, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if name.endswith('.parquet'):
      pyarrow.parquet.write_table(pyarrow.table(content), path)
      return path
    if isinstance(content, str):
      content = content.encode()
    with open(path, 'wb') as file:
      file.write(content)
    return path

  def read(self, path=None):
    return list(corpus.documents(path or self.root))

  def test_stdlib_is_every_module_but_tests_in_sorted_order(self):
    docs = self.read('stdlib')
    names = [doc.name for doc in docs]
    self.assertEqual(len(names), len(set(names)))
    self.assertEqual(names, sorted(names, key=lambda name: name.split('/')))
    self.assertContainsSubset({'ast.py', 'json/decoder.py'}, names)
    skipped = {'test', 'tests', 'idle_test', 'site-packages', '__pycache__'}
    for name in names:
      self.assertEndsWith(name, '.py')
      self.assertNoCommonElements(skipped, name.split('/'))
      self.assertNotIn('_sysconfigdata', name)
    self.assertGreater(sum(len(doc.text) for doc in docs), 8_000_000)
    root = sysconfig.get_paths()['stdlib']
    for name, text in docs[::40]:
      with open(os.path.join(root, name), 'rb') as file:
        self.assertEqual(text.encode(), file.read(), name)

  def test_every_kind_of_file_is_read_exactly_and_in_order(self):
    self.write('b/two.md', '# dos\r\n\r\ntext\rend')
    self.write('b/one.py', 'x = 1\n')
    self.write('b.txt', '\ufeffnaïve 東京\x00')
    lines = [{'text': 'first'}, {'text': 'second\n', 'other': 1}]
    rows = '\n\n'.join(map(json.dumps, lines))
    self.write('a.jsonl', rows)
    self.write('c.parquet', {'n': [1, 2], 'text': ['row 0', 'row 1']})
    self.write('empty.txt', '')
    self.write('picture.png', b'\xff\xfe')
    self.write('.hidden/x.txt', 'hidden')
    self.write('.x.txt', 'hidden')
    self.assertEqual(
      self.read(),
      [
        ('a.jsonl:1', 'first'),
        ('a.jsonl:3', 'second\n'),
        ('b/one.py', 'x = 1\n'),
        ('b/two.md', '# dos\r\n\r\ntext\rend'),
        ('b.txt', '\ufeffnaïve 東京\x00'),
        ('c.parquet:0', 'row 0'),
        ('c.parquet:1', 'row 1'),
      ],
    )
    records = self.read(os.path.join(self.root, 'a.jsonl'))
    self.assertEqual([doc.name for doc in records], ['a.jsonl:1', 'a.jsonl:3'])

  def test_suffixes_may_be_in_capitals(self):
    self.write('A.TXT', 'a')
    self.write('b.Py', 'b')
    self.write('C.JSONL', '{"text": "c"}')
    names = ['A.TXT', 'C.JSONL:1', 'b.Py']
    self.assertEqual([doc.name for doc in self.read()], names)
    alone = self.read(os.path.join(self.root, 'A.TXT'))
    self.assertEqual([doc.text for doc in alone], ['a'])

  def test_a_linked_folder_is_read_once_and_loops_end(self):
    outside = self.enterContext(tempfile.TemporaryDirectory())
    with open(os.path.join(outside, 'far.txt'), 'w') as file:
      file.write('far')
    self.write('near.txt', 'near')
    os.symlink(outside, os.path.join(self.root, 'link'))
    os.symlink(self.root, os.path.join(self.root, 'loop'))
    names = [doc.name for doc in self.read()]
    self.assertEqual(names, ['link/far.txt', 'near.txt'])

  @parameterized.parameters('word word\n\nword.\n', 'line\n', 'x', '\r\n')
  def test_a_file_by_itself_is_cut_without_loss(self, unit):
    text = unit * (100_000 // len(unit))
    path = self.write('book.txt', text)
    docs = self.read(path)
    self.assertEqual(''.join(doc.text for doc in docs), text)
    self.assertBetween(len(docs), 3, 7)
    for doc in docs[:-1]:
      self.assertBetween(len(doc.text), 16384, 2 * 16384)
    self.assertEqual([d.name for d in docs[:2]], ['book.txt:0', 'book.txt:1'])
    if '\n' in unit:
      for doc in docs[:-1]:
        self.assertEndsWith(doc.text, '\n\n' if '\n\n' in unit else '\n')
    self.write('book.txt', text + 'one more line')
    self.assertEqual(self.read(path)[: len(docs) - 1], docs[:-1])

  def test_adding_documents_moves_no_other_across_the_split(self):
    texts = [f'text number {i}' for i in range(4000)]
    held = [text for text in texts if corpus.is_held_out(text, 0.1)]
    # Five standard deviations of a binomial of 4000 draws.
    self.assertBetween(len(held), 400 - 95, 400 + 95)
    # A text alone decides, and a larger share keeps what was held out.
    self.assertEqual(corpus.is_held_out(held[0], 0.1), True)
    self.assertTrue(all(corpus.is_held_out(text, 0.11) for text in held))
    self.assertFalse(any(corpus.is_held_out(text, 0.0) for text in texts))

  def test_the_split_is_the_same_on_every_machine(self):
    texts = [f'{i}.py' for i in range(100)]
    held = [text for text in texts if corpus.is_held_out(text, 0.05)]
    self.assertEqual(held, ['28.py', '61.py', '66.py', '76.py'])

  def test_the_hash_sees_names_texts_order_and_borders(self):
    doc = corpus.Document
    corpora = [
      [doc('a', 'xy'), doc('b', 'z')],
      [doc('a', 'x'), doc('b', 'yz')],
      [doc('a', 'xyz')],
      [doc('b', 'z'), doc('a', 'xy')],
      [doc('ax', 'y'), doc('b', 'z')],
      [doc('c', 'xy'), doc('b', 'z')],
    ]
    hashes = {corpus.corpus_sha256(docs) for docs in corpora}
    self.assertLen(hashes, len(corpora))
    again = corpus.corpus_sha256(iter(corpora[0]))
    self.assertIn(again, hashes)

  @parameterized.parameters(
    ('a.txt', b'ok \xe9t\xe9', 'a.txt', 'not UTF-8 (byte 3)'),
    ('a.jsonl', b'{"text": "ok"}\n{"text": "\xff"}', 'line 2', 'not UTF-8'),
    ('a.jsonl', '{"text": "ok"}\n{"text"', 'line 2', 'not JSON'),
    ('a.jsonl', '{"text": "ok"}\n' + '[' * 200_000, 'line 2', 'too deeply'),
    ('a.jsonl', '{"txt": "ok"}', 'line 1', "no string 'text'"),
    ('a.jsonl', '{"text": 3}', 'line 1', "no string 'text'"),
    ('a.jsonl', '["text"]', 'line 1', "no string 'text'"),
    ('a.jsonl', '{"text": "\\ud800"}', 'line 1', 'not valid Unicode'),
    ('a.parquet', {'body': ['x']}, 'a.parquet', "no column 'text' but body"),
    ('a.parquet', {'text': [1]}, 'row 0', "no string 'text'"),
  )
  def test_bad_text_is_refused_by_name(self, name, content, where, what):
    self.write(name, content)
    with self.assertRaises(InputError) as caught:
      self.read()
    message = str(caught.exception)
    self.assertIn(where, message)
    self.assertIn(what, message)
    self.assertIn('data.path', message)
    self.assertNotIn('\n', message)

  @parameterized.parameters(
    ('missing', None, 'does not exist'),
    ('page.html', '<p>', 'is not one of .txt'),
    ('bad.parquet', 'no parquet', 'is not a sound parquet file'),
  )
  def test_a_bad_path_is_refused_by_name(self, name, content, what):
    path = os.path.join(self.root, name)
    if content:
      with open(path, 'w') as file:
        file.write(content)
    with self.assertRaisesRegex(InputError, f'data.path.*{name}.*{what}'):
      self.read(path)

  def test_parquet_text_that_is_not_utf8_is_refused_by_name(self):
    offsets = pyarrow.py_buffer(np.array([0, 2], np.int32))
    parts = [None, offsets, pyarrow.py_buffer(b'\xff\xfe')]
    text = pyarrow.Array.from_buffers(pyarrow.string(), 1, parts)
    self.write('a.parquet', {'text': text})
    with self.assertRaisesRegex(InputError, 'a.parquet .* UTF-8'):
      self.read()

  @parameterized.parameters(0.3, 0.6, 0.9)
  def test_a_truncated_parquet_file_is_refused_by_name(self, part):
    path = self.write('a.parquet', {'text': [str(i) for i in range(999)]})
    os.truncate(path, int(os.path.getsize(path) * part))
    with self.assertRaisesRegex(InputError, 'a.parquet is not a sound'):
      self.read()

  def test_a_folder_that_cannot_be_listed_is_refused_by_name(self):
    self.write('open/a.txt', 'text')
    self.write('shut/b.txt', 'text')
    scan = os.scandir

    def guarded(path):
      if str(path).endswith('shut'):
        raise PermissionError(13, 'Permission denied', path)
      return scan(path)

    with (
      mock.patch.object(os, 'scandir', guarded),
      self.assertRaisesRegex(InputError, 'cannot read .*shut .Permission'),
    ):
      self.read()

  def test_a_broken_link_in_a_folder_is_refused_by_name(self):
    os.symlink('/nowhere', os.path.join(self.root, 'gone.txt'))
    with self.assertRaisesRegex(InputError, 'cannot read .*gone.txt'):
      self.read()


if __name__ == '__main__':
  absltest.main()
