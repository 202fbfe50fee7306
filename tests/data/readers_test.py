"""Every kind of file gives its texts exactly, in bounded memory."""

import gzip
import json
import os
import subprocess
import sys
import tempfile

import numpy as np
import pyarrow
import pyarrow.parquet
from absl.testing import absltest, parameterized

from deepseek_jax import data
from deepseek_jax.data import corpus, readers
from deepseek_jax.data.census import census_of
from deepseek_jax.data.left_out import LeftOut
from deepseek_jax.errors import InputError

TEXTS = ['naïve 東京\r\n', 'x' * 3000, '\x00\u2028 end', 'last']

# Prints documents, bytes, and by how many MB reading raised the peak.
_PEAK = """
import sys
def peak():
  with open('/proc/self/status') as f:
    return next(int(l.split()[1]) for l in f if l.startswith('VmHWM')) / 1e3
from deepseek_jax.data import corpus
import pyarrow.parquet, pyarrow.ipc, gzip
before, count, size = peak(), 0, 0
for doc in corpus.documents(sys.argv[1]):
  count, size = count + 1, size + len(doc.text)
print(count, size, peak() - before)
"""


def pack(content, packed):
  if packed == '.gz':
    # Two members, as parallel compressors write.
    return gzip.compress(content[:50]) + gzip.compress(content[50:])
  if packed == '.zst':
    parts = content[:50], content[50:]
    frames = [pyarrow.compress(part, 'zstd', asbytes=True) for part in parts]
    return b''.join(frames)
  return content


class ReadersTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = self.enterContext(tempfile.TemporaryDirectory())

  def path(self, name):
    return os.path.join(self.root, name)

  def write(self, name, content):
    with open(self.path(name), 'wb') as file:
      file.write(content)

  def texts(self, path=None):
    return [doc.text for doc in corpus.documents(path or self.root)]

  def write_arrow(self, name, table, form='stream'):
    new = {'stream': pyarrow.ipc.new_stream, 'file': pyarrow.ipc.new_file}
    with new[form](self.path(name), table.schema) as out:
      out.write_table(table, max_chunksize=3)

  @parameterized.product(
    kind=['.jsonl', '.json', '.list.json'], packed=['', '.gz', '.zst']
  )
  def test_records_are_read_exactly(self, kind, packed):
    records = [{'n': i, 'text': text} for i, text in enumerate(TEXTS)]
    content = '\n'.join(json.dumps(r, ensure_ascii=False) for r in records)
    if kind == '.list.json':
      content = json.dumps(records, ensure_ascii=False)
    name = f'a{kind}{packed}'
    self.write(name, pack(content.encode(), packed))
    self.assertEqual(self.texts(), TEXTS)
    self.assertEqual(self.texts(self.path(name)), TEXTS)

  @parameterized.product(kind=['.txt', '.py', '.md'], packed=['.gz', '.zst'])
  def test_packed_text_is_read_exactly(self, kind, packed):
    self.write(f'a{kind}{packed}', pack(''.join(TEXTS).encode(), packed))
    self.assertEqual(self.texts(), [''.join(TEXTS)])

  @parameterized.product(
    form=['stream', 'file'],
    text=[pyarrow.string(), pyarrow.large_string(),
          pyarrow.dictionary(pyarrow.int32(), pyarrow.string())],
  )  # fmt: skip
  def test_arrow_is_read_exactly(self, form, text):
    texts = [*TEXTS, *TEXTS, None]
    column = pyarrow.array(texts, pyarrow.string()).cast(text)
    table = pyarrow.table({'n': range(9), 'text': column})
    self.write_arrow('a.arrow', table, form)
    self.assertEqual(self.texts(), [*TEXTS, *TEXTS])

  @parameterized.parameters(
    {}, {'compression': 'zstd'}, {'use_dictionary': False}
  )
  def test_parquet_is_read_exactly(self, **options):
    table = pyarrow.table({'n': range(40), 'text': TEXTS * 10})
    path = self.path('a.parquet')
    pyarrow.parquet.write_table(table, path, row_group_size=7, **options)
    self.assertEqual(self.texts(), TEXTS * 10)

  @parameterized.product(
    name=['a.txt', 'a.jsonl', 'a.json'], packed=['.gz', '.zst']
  )
  def test_damaged_packed_files_are_refused_by_name(self, name, packed):
    rng = np.random.default_rng(0)
    text = rng.integers(32, 127, 9999, np.uint8).tobytes().decode()
    content = text if name == 'a.txt' else json.dumps({'text': text}) + '\n'
    whole = pack(content.encode(), packed)
    flipped = bytearray(whole)
    flipped[-3] ^= 255  # of the checksum, or of the text
    damages = [whole[:-20], whole[:3], b'', content.encode()]
    if packed == '.gz':
      damages.append(flipped)
    for damaged in damages:
      if packed == '.gz' and not damaged:
        continue  # no member is no text
      self.write(name + packed, damaged)
      with self.assertRaisesRegex(InputError, f'{name}.*{packed}') as caught:
        self.texts()
      self.assertNotIn('\n', str(caught.exception))

  @parameterized.parameters(0, 7, 0.5, -9)
  def test_a_cut_arrow_file_is_refused_by_name(self, size):
    for form in ('stream', 'file'):
      self.write_arrow('a.arrow', pyarrow.table({'text': TEXTS}), form)
      whole = os.path.getsize(self.path('a.arrow'))
      cut = int(whole * size) if 0 < size < 1 else size % whole
      os.truncate(self.path('a.arrow'), cut)
      with self.assertRaisesRegex(InputError, 'a.arrow is not a sound arrow'):
        self.texts()

  def test_a_byte_order_mark_before_records_is_no_text(self):
    for name in ('a.jsonl', 'a.json'):
      self.write(name, b'\xef\xbb\xbf' + json.dumps({'text': 'ab'}).encode())
    self.assertEqual(self.texts(), ['ab', 'ab'])

  def test_null_texts_are_counted_and_left_out(self):
    table = pyarrow.table({'text': ['a', None, 'b', None]})
    pyarrow.parquet.write_table(table, self.path('a.parquet'))
    self.write('b.jsonl', b'{"text": null}\n{"text": "c"}\n')
    out = LeftOut('DIR')
    docs = list(corpus.documents(self.root, out))
    names = ['a.parquet:0', 'a.parquet:2', 'b.jsonl:2']
    self.assertEqual([doc.name for doc in docs], names)
    self.assertIn(
      '3 record whose text is null (a.parquet, b.jsonl)', out.line()
    )
    self.write('c.jsonl', b'{"text": null}\n' * 2)
    config = data.DataConfig(path=self.root, heldout_fraction=0.0)
    with self.assertRaisesRegex(InputError, '5 records .* null text and 3 a'):
      census_of(config)

  def test_a_long_text_is_cut_alike_in_a_folder_and_alone(self):
    unit = 'word wörd\n' * 40 + '\n'
    text = unit * (readers._WHOLE // len(unit) + 99)
    self.write('big.txt', text.encode())
    alone = list(corpus.documents(self.path('big.txt')))
    self.assertEqual(list(corpus.documents(self.root)), alone)
    self.assertEqual(''.join(doc.text for doc in alone), text)
    self.assertLess(max(len(doc.text) for doc in alone), 2**15 + 1)

  def test_utf8_that_is_wrong_far_inside_is_refused_by_its_byte(self):
    for place in (readers._CHUNK - 1, readers._CHUNK, 3 * readers._CHUNK + 1):
      self.write(
        'a.txt', 'é'.encode() * (place // 2) + b'x' * (place % 2) + b'\xe9'
      )
      with self.assertRaisesRegex(InputError, rf'not UTF-8 .byte {place}\)'):
        self.texts()

  def peak(self, count, size):
    """MB that reading the folder takes at its peak."""
    done = subprocess.run(
      [sys.executable, '-c', _PEAK, self.root],
      capture_output=True, text=True, check=False,
    )  # fmt: skip
    self.assertEqual(done.returncode, 0, msg=done.stderr)
    found = done.stdout.split()
    self.assertEqual((int(found[0]), int(found[1])), (count, size))
    return float(found[2])

  @parameterized.parameters(True, False)
  def test_a_small_parquet_of_much_text_takes_little_memory(self, dictionary):
    # 192 MB of text, a few MB on disk; a page is a row group of 16 MB.
    row = 'a long row of text  ' * 800
    schema = pyarrow.schema({'text': pyarrow.string()})
    with pyarrow.parquet.ParquetWriter(
      self.path('a.parquet'), schema, compression='zstd',
      use_dictionary=dictionary,
    ) as out:  # fmt: skip
      for group in range(12):
        rows = [f'{group} {i}'.ljust(10) + row for i in range(1000)]
        out.write_table(pyarrow.table({'text': rows}, schema))
    self.assertLess(os.path.getsize(self.path('a.parquet')), 12e6)
    self.assertLess(self.peak(12_000, 12_000 * (len(row) + 10)), 110)

  @parameterized.parameters('.txt', '.jsonl', '.json')
  def test_packed_text_takes_little_memory(self, kind):
    line = {
      '.txt': 'words\n' * 2500,
      '.jsonl': json.dumps({'text': 'w' * 15_000}),
    }
    line['.json'] = line['.jsonl']
    content = (line[kind] + '\n') * 6000
    if kind == '.json':
      content = '[' + ',\n'.join([line[kind]] * 6000) + ']'
    whole = pyarrow.compress(content.encode(), 'zstd', asbytes=True)
    self.assertLess(len(whole), 5e6)
    self.write(f'a{kind}.zst', whole)
    texts = self.texts() if kind == '.txt' else ['w' * 15_000] * 6000
    size = sum(map(len, texts))
    self.assertGreater(size, 89e6)
    self.assertLess(self.peak(len(texts), size), 130 if kind == '.txt' else 60)

  def test_a_record_without_end_is_refused_in_little_memory(self):
    with gzip.open(self.path('a.jsonl.gz'), 'wb', compresslevel=1) as file:
      file.write(b'{"text": "')
      for _ in range(80):
        file.write(b'x' * (1 << 20))
    with self.assertRaisesRegex(InputError, 'a.jsonl.gz line 1 has more than'):
      self.texts()


class CopiesTest(parameterized.TestCase):
  def test_copies_of_a_text_are_on_one_side_of_the_split(self):
    root = self.enterContext(tempfile.TemporaryDirectory())
    for i in range(60):
      for copy in ('a', 'b/c', 'd'):
        os.makedirs(os.path.join(root, copy), exist_ok=True)
        with open(os.path.join(root, copy, f'{copy[0]}{i}.txt'), 'w') as file:
          file.write(f'document {i}')
    built = data.build(
      data.DataConfig(
        path=root, tokenizer='bytes', vocab_size=300, heldout_fraction=0.3,
        fim_rate=0.0,
        cache_dir=self.enterContext(tempfile.TemporaryDirectory()),
      )
    )  # fmt: skip
    held = built.heldout_texts()
    decoded = data.ByteTokenizer().decode(built.train.tolist())
    trained = decoded.split('<|eos|>')[:-1]
    self.assertBetween(len(set(held)), 6, 30)
    self.assertLen(held, 3 * len(set(held)))
    self.assertLen(trained, 3 * len(set(trained)))
    self.assertNoCommonElements(set(held), set(trained))


if __name__ == '__main__':
  absltest.main()
