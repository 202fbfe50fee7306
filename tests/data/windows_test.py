import dataclasses
import json
import os
import shutil
import tempfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax import data
from deepseek_jax.data import corpus, infill, windows
from deepseek_jax.data import token_store as store
from deepseek_jax.errors import InputError

EOS, BEGIN, HOLE, END = 1, 2, 3, 4  # of the byte tokenizer


def write_corpus(root, count=200):
  """Small documents of different lengths, some not ASCII."""
  for i in range(count):
    folder = os.path.join(root, f'part{i % 3}')
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, f'{i}.txt'), 'w', encoding='utf-8') as file:
      file.write(f'document {i}: ' + 'né ' * (i % 17) + '\n')


def split_at_eos(tokens):
  """The documents of a token stream, without their EOS."""
  ends = np.flatnonzero(np.asarray(tokens) == EOS)
  assert len(tokens) == 0 or ends[-1] == len(tokens) - 1
  starts = np.concatenate([[0], ends[:-1] + 1])
  return [list(map(int, tokens[a:b])) for a, b in zip(starts, ends)]


class WindowsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = self.enterContext(tempfile.TemporaryDirectory())
    self.cache = self.enterContext(tempfile.TemporaryDirectory())
    write_corpus(self.root)

  def config(self, **changes):
    base = data.DataConfig(
      path=self.root,
      tokenizer='bytes',
      vocab_size=300,
      fim_rate=0.0,
      heldout_fraction=0.1,
      cache_dir=self.cache,
    )
    return dataclasses.replace(base, **changes)

  def stores(self):
    folder = os.path.join(self.cache, 'tokens')
    return sorted(os.listdir(folder)) if os.path.exists(folder) else []

  def test_both_files_hold_every_document_once(self):
    built = data.build(self.config())
    docs = list(data.documents(self.root))
    decode = data.ByteTokenizer().decode
    parts = {True: built.heldout, False: built.train}
    for held, tokens in parts.items():
      expected = [d for d in docs if data.is_held_out(d.text, 0.1) == held]
      self.assertNotEmpty(expected)
      found = [decode(ids) for ids in split_at_eos(tokens)]
      self.assertEqual(found, [doc.text for doc in expected])
    sizes = [built.index[part]['bytes'] for part in ('train', 'heldout')]
    self.assertEqual(sum(sizes), sum(len(d.text.encode()) for d in docs))
    for part, tokens in (('train', built.train), ('heldout', built.heldout)):
      self.assertEqual(built.index[part]['tokens'], len(tokens))
      self.assertEqual(
        built.index[part]['documents'], len(split_at_eos(tokens))
      )

  def test_held_out_documents_are_found_by_name(self):
    built = data.build(self.config())
    texts = dict(data.documents(self.root))
    docs = built.heldout_documents()
    self.assertEqual(
      {doc.name for doc in docs},
      {n for n, text in texts.items() if data.is_held_out(text, 0.1)},
    )
    self.assertEqual(built.heldout_texts(), [texts[d.name] for d in docs])
    decode = data.ByteTokenizer().decode
    for doc in docs:
      ids = built.heldout[doc.offset : doc.offset + doc.tokens]
      self.assertEqual(decode(ids), texts[doc.name] + '<|eos|>')
      self.assertEqual(doc.bytes, len(texts[doc.name].encode()))

  @parameterized.parameters(0.3, 1.0)
  def test_fim_parts_reassemble_to_the_document(self, rate):
    built = data.build(self.config(fim_rate=rate))
    decode, cut = data.ByteTokenizer().decode, 0
    docs = [
      d for d in data.documents(self.root) if not data.is_held_out(d.text, 0.1)
    ]
    streams = split_at_eos(built.train)
    self.assertLen(streams, len(docs))
    for doc, ids in zip(docs, streams):
      if BEGIN in ids:
        cut += 1
        hole, end = ids.index(HOLE), ids.index(END)
        self.assertEqual(ids[0], BEGIN)
        pre, suf, mid = ids[1:hole], ids[hole + 1 : end], ids[end + 1 :]
        self.assertEqual(decode([*pre, *mid, *suf]), doc.text)
      else:
        self.assertEqual(decode(ids), doc.text)
    self.assertEqual(built.index['train']['fim_documents'], cut)
    # Five standard deviations of a binomial.
    slack = 5 * (len(docs) * rate * (1 - rate)) ** 0.5
    self.assertBetween(cut, len(docs) * rate - slack, len(docs) * rate + slack)
    self.assertNoCommonElements({BEGIN, HOLE, END}, set(built.heldout.tolist()))

  def test_fim_depends_on_the_seed_and_plain_stores_do_not(self):
    stores = [data.build(self.config(fim_rate=0.5, seed=s)) for s in (0, 1)]
    self.assertNotEqual(stores[0].train_sha256, stores[1].train_sha256)
    plain = [data.build(self.config(seed=s)).path for s in (0, 1)]
    self.assertEqual(*plain)

  def test_a_built_store_is_used_again(self):
    first = data.build(self.config())
    with mock.patch.object(windows, '_write', side_effect=AssertionError):
      again = data.build(self.config(seq_len=64, cross_document=False))
    self.assertEqual(first.path, again.path)
    np.testing.assert_array_equal(first.train, again.train)

  @parameterized.parameters(
    {'fim_rate': 0.2}, {'heldout_fraction': 0.2}, {'tokenizer': 'bpe'}
  )
  def test_a_change_of_setting_makes_another_store(self, **change):
    first = data.build(self.config())
    self.assertNotEqual(data.build(self.config(**change)).path, first.path)
    self.assertLen(self.stores(), 2)

  def test_bpe_vocabularies_of_two_sizes_are_two_stores(self):
    sizes = (280, 290)
    built = [
      data.build(self.config(tokenizer='bpe', vocab_size=size))
      for size in sizes
    ]
    self.assertEqual(tuple(store.vocab_size for store in built), sizes)

  def test_a_change_of_the_text_makes_another_store(self):
    first = data.build(self.config())
    with open(os.path.join(self.root, 'part0', '0.txt'), 'a') as file:
      file.write('more')
    self.assertNotEqual(data.build(self.config()).path, first.path)

  def test_bpe_is_trained_on_training_documents_only(self):
    seen = []

    def train(texts, vocab_size):
      seen.extend(texts)
      return data.ByteTokenizer()

    with mock.patch.object(windows, 'train_bpe', train):
      data.build(self.config(tokenizer='bpe'))
    docs = data.documents(self.root)
    expected = [d.text for d in docs if not data.is_held_out(d.text, 0.1)]
    self.assertEqual(seen, expected)

  def test_a_large_corpus_is_sampled_to_train_the_bpe(self):
    config = self.config(tokenizer='bpe')
    total = windows.census_of(config).characters
    with mock.patch.object(windows, '_BPE_CHARACTERS', total // 2):
      texts = list(windows._bpe_texts(config, windows.census_of(config)))
    self.assertBetween(sum(map(len, texts)), 0.3 * total, 0.7 * total)

  def test_documents_are_encoded_in_any_batching_alike(self):
    whole = data.build(self.config(fim_rate=0.5))
    other = self.enterContext(tempfile.TemporaryDirectory())
    with mock.patch.object(windows, '_BATCH_CHARACTERS', 100):
      parts = data.build(self.config(fim_rate=0.5, cache_dir=other))
    self.assertEqual(whole.train_sha256, parts.train_sha256)

  def test_vocabularies_above_16_bits_are_stored_in_32(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    texts = [doc.text for doc in data.documents(self.root)]
    data.train_bpe(texts, 300).save(folder)
    path = os.path.join(folder, 'tokenizer.json')
    with open(path) as file:
      spec = json.load(file)
    spec['model']['merges'] = []
    vocab = spec['model']['vocab']
    # 'n' gets an id that 16 bits would wrap to 1, the EOS.
    vocab.update({f'unused{i}': i for i in range(300, 65537)})
    vocab[f'unused{vocab["n"]}'], vocab['n'] = vocab['n'], 65537
    with open(path, 'w') as file:
      json.dump(spec, file)
    built = data.build(self.config(tokenizer=folder, vocab_size=70_000))
    self.assertEqual(built.train.dtype, np.uint32)
    self.assertEqual(built.train.max(), 65537)
    self.assertEqual(
      built.heldout_texts(),
      [
        d.text
        for d in data.documents(self.root)
        if data.is_held_out(d.text, 0.1)
      ],
    )

  def test_nothing_held_out_is_an_empty_file(self):
    built = data.build(self.config(heldout_fraction=0.0))
    self.assertEmpty(built.heldout)
    self.assertEmpty(built.heldout_documents())

  def test_a_build_that_dies_leaves_nothing(self):
    with (
      mock.patch.object(store, 'write_index', side_effect=KeyboardInterrupt),
      self.assertRaises(KeyboardInterrupt),
    ):
      data.build(self.config())
    self.assertEmpty(self.stores())
    data.build(self.config())
    self.assertLen(self.stores(), 1)

  def test_a_slower_process_takes_the_faster_ones_store(self):
    write = windows._write

    def twice(*args):
      write(*args)
      write(*args)

    with mock.patch.object(windows, '_write', twice):
      built = data.build(self.config())
    self.assertEqual(self.stores(), [os.path.basename(built.path)])

  def test_a_full_disk_is_one_line_and_leaves_nothing(self):
    full = OSError(28, 'No space left on device')
    with (
      mock.patch.object(store, 'write_index', side_effect=full),
      self.assertRaisesRegex(InputError, 'data.cache_dir=.*No space left'),
    ):
      data.build(self.config())
    self.assertEmpty(self.stores())

  def test_a_corpus_that_changes_while_it_is_read_is_refused(self):
    def changed(config):
      with open(os.path.join(self.root, 'new.txt'), 'w') as file:
        file.write('new')
      return data.ByteTokenizer()

    with (
      mock.patch.object(windows, '_tokenizer', lambda c, census: changed(c)),
      self.assertRaisesRegex(InputError, 'changed while it was read'),
    ):
      data.build(self.config())
    self.assertEmpty(self.stores())

  def test_text_that_tokenizes_to_eos_is_refused(self):
    with (
      mock.patch.object(data.ByteTokenizer, 'eos_id', 5 + ord('d')),
      self.assertRaisesRegex(InputError, 'end of text inside part0/0.txt'),
    ):
      data.build(self.config())

  def test_a_tokenizer_that_loses_held_out_text_is_refused(self):
    with (
      mock.patch.object(data.ByteTokenizer, 'decode', lambda self, ids: ''),
      self.assertRaisesRegex(InputError, 'does not give part.* back exactly'),
    ):
      data.build(self.config())

  @parameterized.parameters(
    ({'vocab_size': 260}, 'data.vocab_size=260.*261 tokens'),
    ({'heldout_fraction': 1e-9}, 'data.heldout_fraction=1e-09 holds out none'),
    ({'path': '/no/such'}, "data.path='/no/such' does not exist"),
    ({'tokenizer': '/no/such'}, "data.tokenizer: cannot read '/no/such'"),
    ({'cache_dir': '/dev/null'}, "data.cache_dir='/dev/null': cannot write"),
  )
  def test_bad_input_is_refused(self, change, message):
    with self.assertRaisesRegex(InputError, message):
      data.build(self.config(**change))
    self.assertEmpty(self.stores())

  def test_the_advised_fraction_holds_a_document_out(self):
    with self.assertRaises(InputError) as caught:
      data.build(self.config(heldout_fraction=1e-9))
    advice = str(caught.exception).split('set it to ')[1].split()[0]
    built = data.build(self.config(heldout_fraction=float(advice)))
    self.assertNotEmpty(built.heldout_documents())

  def test_a_corpus_without_text_is_refused(self):
    empty = self.enterContext(tempfile.TemporaryDirectory())
    with open(os.path.join(empty, 'empty.txt'), 'w'):
      pass
    with self.assertRaisesRegex(InputError, 'data.path=.* has no text'):
      data.build(self.config(path=empty))

  def test_a_split_that_leaves_nothing_to_train_on_is_refused(self):
    one = os.path.join(self.root, 'part0')
    for name in os.listdir(one)[1:]:
      os.remove(os.path.join(one, name))
    (doc,) = data.documents(one)
    fraction = (corpus.held_out_hash(doc.text) + 1) / 2
    with self.assertRaisesRegex(InputError, 'holds out all 1 documents'):
      data.build(self.config(path=one, heldout_fraction=fraction))

  def test_fim_needs_a_tokenizer_with_fim_tokens(self):
    with (
      mock.patch.object(data.ByteTokenizer, 'fim', None),
      self.assertRaisesRegex(InputError, 'data.fim_rate=0.1.*set it to 0'),
    ):
      data.build(self.config(fim_rate=0.1))


class StdlibTest(absltest.TestCase):
  def test_the_default_is_the_standard_library_under_a_4k_bpe(self):
    cache = self.enterContext(tempfile.TemporaryDirectory())
    built = data.build(data.DataConfig(cache_dir=cache))
    texts = dict(data.documents('stdlib'))
    held = {doc.name for doc in built.heldout_documents()}
    self.assertEqual(
      built.heldout_texts(), [texts[n] for n in texts if n in held]
    )
    train, heldout = built.index['train'], built.index['heldout']
    self.assertEqual(train['documents'] + heldout['documents'], len(texts))
    sizes = {name: len(text.encode()) for name, text in texts.items()}
    self.assertEqual(train['bytes'] + heldout['bytes'], sum(sizes.values()))
    self.assertEqual(heldout['bytes'], sum(sizes[name] for name in held))
    self.assertBetween(heldout['bytes'] / sum(sizes.values()), 0.01, 0.06)
    self.assertBetween(train['fim_documents'] / train['documents'], 0.05, 0.15)
    # Text that the BPE never saw is as short in tokens as text that it did.
    self.assertGreater(train['bytes'] / train['tokens'], 3.2)
    self.assertGreater(heldout['bytes'] / heldout['tokens'], 2.9)
    self.assertEqual((built.vocab_size, int(built.train.max())), (4096, 4095))


class DamageTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    root = self.enterContext(tempfile.TemporaryDirectory())
    cache = self.enterContext(tempfile.TemporaryDirectory())
    write_corpus(root, 40)
    self.config = data.DataConfig(
      path=root, tokenizer='bpe', vocab_size=290, cache_dir=cache,
      heldout_fraction=0.1,
    )  # fmt: skip
    self.path = data.build(self.config).path

  def change(self, name, edit):
    file = os.path.join(self.path, name)
    with open(file, 'rb') as stream:
      content = bytearray(stream.read())
    with open(file, 'wb') as stream:
      stream.write(edit(content))

  def assert_refused(self, name):
    """Both ways in refuse the store, in one line that names the file."""
    opens = (
      lambda: data.TokenStore.open(self.path),
      lambda: data.build(self.config),
    )
    for open_store in opens:
      with self.assertRaises(InputError) as caught:
        open_store()
      message = str(caught.exception)
      self.assertIn(os.path.join(self.path, name), message)
      self.assertIn('delete', message)
      self.assertNotIn('\n', message)

  def test_every_file_is_vouched_for(self):
    names = set(os.listdir(self.path))
    self.assertEqual(
      names,
      {'train.bin', 'heldout.bin', 'index.json', 'tokenizer.json',
       'tokenizer_config.json'},
    )  # fmt: skip
    self.assertEqual(
      set(store.read_index(self.path)['files']), names - {'index.json'}
    )

  @parameterized.product(
    name=[
      'train.bin',
      'heldout.bin',
      'tokenizer.json',
      'tokenizer_config.json',
    ],
    how=['first bit', 'last bit', 'cut', 'longer', 'deleted'],
  )
  def test_a_damaged_file_is_refused_by_name(self, name, how):
    if how == 'deleted':
      os.remove(os.path.join(self.path, name))
    else:
      self.change(name, lambda old: _damage(old, how))
    self.assert_refused(name)

  def test_any_damage_to_the_index_is_refused(self):
    file = os.path.join(self.path, 'index.json')
    with open(file, 'rb') as stream:
      good = stream.read()
    rng = np.random.default_rng(0)
    for at in rng.integers(len(good), size=100):
      bad = bytearray(good)
      bad[at] ^= 1 << int(rng.integers(8))
      self.change('index.json', lambda _, bad=bad: bad)
      if _same_json(bad, good):  # whitespace became other whitespace
        continue
      self.assert_refused('index.json')
    for bad in (b'', b'[]', b'3', good[:-1]):
      self.change('index.json', lambda _, bad=bad: bad)
      self.assert_refused('index.json')

  def test_a_folder_without_index_is_refused(self):
    os.remove(os.path.join(self.path, 'index.json'))
    with self.assertRaisesRegex(InputError, 'index.json is missing'):
      data.build(self.config)

  def test_a_smaller_model_vocabulary_is_refused(self):
    with self.assertRaisesRegex(InputError, 'vocab_size=289.*has 290 tokens'):
      data.TokenStore.open(self.path, vocab_size=289)
    data.TokenStore.open(self.path, vocab_size=290)

  def test_a_token_id_past_the_vocabulary_is_refused(self):
    # A consistent store whose tokens are wrong: every hash is right.
    index = store.read_index(self.path)
    self.change('train.bin', lambda old: old[:-2] + b'\x22\x01')  # 290
    self._sign_again(index)
    with self.assertRaisesRegex(InputError, 'train.bin.*token 290 of a voc'):
      data.TokenStore.open(self.path)

  def test_another_tokenizer_with_right_file_hashes_is_refused(self):
    index = store.read_index(self.path)
    data.train_bpe(['other text ' * 20 + 'abcdefghij' * 30], 270).save(
      self.path
    )
    self._sign_again(index)
    with self.assertRaisesRegex(
      InputError, 'tokenizer.json.*another tokenizer'
    ):
      data.TokenStore.open(self.path).tokenizer()

  def test_a_store_of_another_corpus_in_its_place_is_refused(self):
    other = dataclasses.replace(self.config, fim_rate=0.7)
    path = data.build(other).path
    shutil.rmtree(path)
    shutil.copytree(self.path, path)
    with self.assertRaisesRegex(InputError, 'another corpus or setting'):
      data.build(other)

  def test_another_format_is_refused(self):
    index = store.read_index(self.path)
    with mock.patch.object(store, 'FORMAT', 2):
      self._sign_again(index)
    self.assert_refused('index.json')

  def _sign_again(self, index):
    os.remove(os.path.join(self.path, 'index.json'))
    store.write_index(self.path, index)


def _damage(content, how):
  if how == 'cut':
    return content[:-2]
  if how == 'longer':
    return content + b'  '
  content[0 if how == 'first bit' else -1] ^= 1
  return content


def _same_json(a, b):
  try:
    return json.loads(bytes(a)) == json.loads(b)
  except ValueError:
    return False


class InfillTest(absltest.TestCase):
  def test_split_places_are_uniform_and_parts_make_the_text(self):
    text = 'naïve東'
    seen = {}
    for seed in range(6000):
      doc = corpus.Document('name', text)
      pre, mid, suf = infill.fim(doc, 1.0, seed)
      self.assertEqual(pre + mid + suf, text)
      key = len(pre), len(pre) + len(mid)
      seen[key] = seen.get(key, 0) + 1
    # Two ordered places of 7: 28 pairs; equal places are half as likely.
    self.assertLen(seen, 28)
    for (a, b), count in seen.items():
      mean = 6000 / 49 * (1 if a == b else 2)
      self.assertBetween(count, mean - 6 * mean**0.5, mean + 6 * mean**0.5)

  def test_the_rate_is_kept_and_a_higher_rate_keeps_what_was_cut(self):
    docs = [corpus.Document(f'{i}.py', 'text') for i in range(2000)]
    cut = {d.name for d in docs if infill.fim(d, 0.1, 0)}
    self.assertBetween(len(cut), 200 - 67, 200 + 67)
    self.assertContainsSubset(
      cut, {d.name for d in docs if infill.fim(d, 0.2, 0)}
    )
    self.assertNotEqual(cut, {d.name for d in docs if infill.fim(d, 0.1, 1)})
    self.assertFalse(any(infill.fim(d, 0.0, 0) for d in docs))


if __name__ == '__main__':
  absltest.main()
