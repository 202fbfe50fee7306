"""Says what under data.path is trained on, and what is left out."""

import gzip
import json
import os
import tempfile

import pyarrow
import pyarrow.parquet
from absl.testing import absltest, parameterized

from deepseek_jax.data import corpus
from deepseek_jax.data.census import census_of
from deepseek_jax.data.config import DataConfig
from deepseek_jax.data.left_out import LeftOut
from deepseek_jax.errors import InputError

POINTER = (
  'version https://git-lfs.github.com/spec/v1\n'
  f'oid sha256:{"4d7a" * 16}\n'
  'size 12345\n'
)
CARD = '---\nlicense: mit\nconfigs:\n{}\n---\n# A dataset\n' + 'Words. ' * 40
TEXT = 'text of some length ' * 8


def record(text=TEXT):
  return json.dumps({'text': text}) + '\n'


class FilesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = self.enterContext(tempfile.TemporaryDirectory())

  def path(self, name):
    return os.path.join(self.root, name)

  def write(self, *names, content=None):
    """Files of the kind that their names say, each with its name as text."""
    for name in names:
      os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
      text = f'{name} {TEXT}'
      if name.endswith('.parquet'):
        table = pyarrow.table({'text': [text]})
        pyarrow.parquet.write_table(table, self.path(name))
        continue
      if name.endswith('.arrow'):
        table = pyarrow.table({'text': [text]})
        with pyarrow.ipc.new_stream(self.path(name), table.schema) as out:
          out.write_table(table)
        continue
      made = content
      if content is None:
        made = record(text) if '.json' in name else text
      made = made.encode() if isinstance(made, str) else made
      if name.endswith('.gz'):
        made = gzip.compress(made)
      if name.endswith('.zst'):
        made = pyarrow.compress(made, 'zstd', asbytes=True)
      with open(self.path(name), 'wb') as file:
        file.write(made)

  def read(self, root=None):
    """The names of the files that are read, and the line on the others."""
    out = LeftOut('DIR')
    docs = list(corpus.documents(root or self.root, out))
    names = [doc.name.partition(':')[0] for doc in docs]
    self.assertLen(names, len(set(names)))
    for doc in docs:  # every file has its own name as text
      self.assertIn(os.path.basename(doc.name.partition(':')[0]), doc.text)
    return names, out.line()

  def assert_refused(self, *words, root=None):
    config = DataConfig(path=root or self.root, heldout_fraction=0.0)
    with self.assertRaises(InputError) as caught:
      census_of(config)
    message = str(caught.exception)
    self.assertNotIn('\n', message)
    for word in ('data.path', *words):
      self.assertIn(word, message)

  @parameterized.parameters(
    'c4-train.00000-of-01024.json.gz',
    'part.jsonl.zst',
    'part.jsonl.gz',
    'part.json',
    'data/train-00000-of-00001.parquet',
    'data-00000-of-00001.arrow',
  )
  def test_a_card_beside_data_is_not_text(self, name):
    self.write(name)
    folder = os.path.dirname(name)
    self.write(os.path.join(folder, 'README.md'), content='# Words of a card')
    names, line = self.read()
    self.assertEqual(names, [name])
    card = os.path.join(folder, 'README.md')
    self.assertEqual(line, f"data.path='DIR': left out 1 dataset card ({card})")

  def test_a_card_of_the_hub_is_not_text_above_its_data(self):
    self.write('data/part.jsonl', 'en/notes.md')
    self.write('README.md', content=CARD.format(''))
    names, line = self.read()
    self.assertEqual(names, ['data/part.jsonl', 'en/notes.md'])
    self.assertIn('1 dataset card (README.md)', line)

  def test_a_readme_of_code_or_prose_is_text(self):
    self.write('README.md', 'x.py', 'tests/data/x.jsonl')
    self.write('package.json', content='{}')
    self.write(
      'docs/README.md', content=f'---\ntitle: a\n---\nREADME.md {TEXT}'
    )
    names, line = self.read()
    self.assertEqual(
      names, ['README.md', 'docs/README.md', 'tests/data/x.jsonl', 'x.py']
    )
    self.assertIn('(package.json)', line)

  @parameterized.parameters(
    ('data/train-0.parquet', 'data/validation-0.parquet'),
    ('c4-train.0.json.gz', 'c4-validation.0.json.gz'),
    ('train.jsonl', 'test.jsonl'),
    ('shard_0.jsonl', 'dev.jsonl'),
    ('en/train/0.parquet', 'en/test/0.parquet'),
    ('train/0.txt', 'validation/0.txt'),
    ('train/code/a.py', 'test/code/b.py'),
    ('Stories-train.txt', 'StoriesV2-valid.txt'),
    ('wiki.train.raw.txt', 'wiki.test.raw.txt'),
    ('x.jsonl', 'eval/x.jsonl'),
    ('test-suite-train-0.arrow', 'train-suite-test-0.arrow'),
    ('train.jsonl', 'train/test-0.jsonl'),
  )
  def test_other_splits_than_train_are_left_out_and_named(self, train, other):
    self.write(train, other)
    names, line = self.read()
    self.assertEqual(names, [train])
    self.assertIn(f'1 another split than train ({other})', line)

  @parameterized.parameters(
    (('test.txt',),),
    (('notes.txt', 'dev.txt'),),
    (('train.py', 'test.py', 'eval.py', 'test/a.py'),),
    (('training.md', 'evaluation.md'),),
    (('latest.jsonl', 'contest.parquet', 'developer.jsonl'),),
  )
  def test_names_that_are_no_splits_are_read(self, files):
    self.write(*files)
    names, line = self.read()
    self.assertEqual(sorted(names), sorted(files))
    self.assertEqual(line, '')

  def test_a_file_of_any_split_is_read_where_it_is_named_itself(self):
    self.write('validation.jsonl')
    names, _ = self.read(self.path('validation.jsonl'))
    self.assertEqual(names, ['validation.jsonl'])
    self.assert_refused('no text', 'another split than train')

  def test_the_splits_of_a_card_are_followed(self):
    self.write('data/a-0.parquet', 'data/a-1.parquet', 'data/b.parquet')
    self.write('held/c.jsonl', 'data/test_like.parquet')
    self.write(
      'README.md',
      content=CARD.format(
        '- config_name: default\n  data_files:\n  - split: train\n    path:\n'
        '    - "data/a-*"\n    - data/test_like.parquet\n'
        '  - split: heldout\n    path: data/b.parquet\n'
        "  - split: extra\n    path: 'held/**'"
      ),
    )
    names, line = self.read()
    self.assertEqual(
      names, ['data/a-0.parquet', 'data/a-1.parquet', 'data/test_like.parquet']
    )
    self.assertIn('train (data/b.parquet, held/c.jsonl)', line)

  def saved(self, folder, split='train'):
    self.write(
      *(f'{folder}data-0000{i}-of-00002.arrow' for i in (0, 1)),
      f'{folder}cache-1f.arrow',
      f'{folder}tmp12.arrow',
    )
    files = [{'filename': f'data-0000{i}-of-00002.arrow'} for i in (0, 1)]
    state = {'_data_files': files, '_split': split, '_fingerprint': 'f'}
    self.write(f'{folder}state.json', content=json.dumps(state))
    self.write(f'{folder}dataset_info.json', content='{}')

  def test_a_saved_dataset_is_its_listed_files(self):
    self.saved('')
    self.write('README.md', content='card')
    names, line = self.read()
    self.assertEqual(
      names, ['data-00000-of-00002.arrow', 'data-00001-of-00002.arrow']
    )
    for words in (
      "2 a dataset's cache (cache-1f.arrow, tmp12.arrow)",
      '2 description of a dataset (dataset_info.json, state.json)',
      '1 dataset card',
    ):
      self.assertIn(words, line)

  def test_a_saved_dataset_with_a_missing_file_or_chosen_rows_is_refused(self):
    self.saved('')
    os.remove(self.path('data-00001-of-00002.arrow'))
    self.assert_refused('state.json', 'data-00001-of-00002.arrow is missing')
    self.saved('')
    state = {'_data_files': [], '_indices_data_files': [{'filename': 'i'}]}
    self.write('state.json', content=json.dumps(state))
    self.assert_refused('state.json', 'selects rows')
    for wrong in ('3', '[' * 99_999, '{"_data_files": [{"filename": 1}, {}]}'):
      self.write('state.json', content=wrong)
      self.assert_refused('state.json', 'not what datasets saves')
    files = [{'filename': 1}, {'filename': '../a'}]
    self.write('state.json', content=json.dumps({'_data_files': files}))
    self.assert_refused('state.json', 'is missing')

  def test_of_a_saved_dictionary_of_datasets_train_is_read(self):
    for split in ('train', 'held', 'test'):
      self.saved(f'{split}/', split)
    splits = {'splits': ['train', 'held', 'test']}
    self.write('dataset_dict.json', content=json.dumps(splits))
    names, line = self.read()
    self.assertEqual({name.split('/')[0] for name in names}, {'train'})
    self.assertIn('another split than train (held/', line)
    splits = {'splits': ['held', 'test']}
    self.write('dataset_dict.json', content=json.dumps(splits))
    self.assert_refused('no split train but held, test')
    names, _ = self.read(self.path('held'))
    self.assertLen(names, 2)

  def hub(self, main='new'):
    base = 'hub/datasets--a--b'
    for revision in ('new', 'old'):
      self.write(f'{base}/snapshots/{revision}/own-{revision}.jsonl')
      self.write(f'{base}/blobs/{revision}')
    self.write(f'{base}/blobs/shared', content=record('part.jsonl'))
    for revision in ('new', 'old'):
      os.symlink(
        '../../blobs/shared',
        self.path(f'{base}/snapshots/{revision}/part.jsonl'),
      )
    if main:
      self.write(f'{base}/refs/main', content=main)
    return base

  @parameterized.parameters('hub', 'hub/datasets--a--b', '.')
  def test_of_a_cache_of_the_hub_the_main_revision_is_read(self, root):
    self.hub()
    self.write('hub/models--x/snapshots/r/vocab.txt', 'hub/models--x/refs/main')
    names, line = self.read(self.path(root))
    names = [name.split('/')[-2:] for name in names]
    expected = [['new', 'own-new.jsonl'], ['new', 'part.jsonl']]
    self.assertEqual(names, expected)
    self.assertIn('1 not the revision of refs/main', line)
    self.assertIn('snapshots/old/', line)

  def test_revisions_without_a_main_one_are_refused(self):
    base = self.hub(main=None)
    os.makedirs(self.path(f'{base}/refs'))
    self.assert_refused('2 revisions', 'give one (new, old)')
    names, _ = self.read(self.path(f'{base}/snapshots/old'))
    self.assertEqual(names, ['own-old.jsonl', 'part.jsonl'])

  @parameterized.parameters('a.txt', 'a.jsonl', 'train.parquet', 'a.json.gz')
  def test_a_pointer_of_git_lfs_is_refused_by_name(self, name):
    self.write('more.txt')
    with open(self.path(name), 'w') as file:
      file.write(POINTER)
    self.assert_refused(name, 'git-lfs pointer', 'git lfs pull')
    self.assert_refused(name, 'git-lfs pointer', root=self.path(name))

  def test_text_about_pointers_is_text(self):
    self.write('a.txt', content=f'a.txt: a pointer is\n{POINTER}')
    self.assertEqual(self.read(), (['a.txt'], ''))

  @parameterized.parameters(
    ('big.jsonl.xz', b'\xfd7zXZ\0' + bytes(5000)),
    ('big.csv', 'text\n' + 'row\n' * 2000),
    ('wiki_00', 'words ' * 2000),
    ('page.html', '<p>words</p>' * 999),
    ('big.json', json.dumps({'data': ['words'] * 999})),
    ('big.json', json.dumps([{'body': 'words ' * 999}])),
    ('big.tar.gz', os.urandom(9999)),
    ('x-train.tfrecord-00000-of-00001', os.urandom(9999)),
  )
  def test_more_text_left_out_than_read_is_refused(self, name, content):
    self.write('notes.txt', 'README.md')
    self.write(name, content=content)
    self.assert_refused('more text is left out than read', name)
    self.write('more.txt', content='more.txt ' * 9999)
    names, line = self.read()
    self.assertEqual(names, ['README.md', 'more.txt', 'notes.txt'])
    self.assertIn(f'({name})', line)

  def test_what_is_no_text_is_named_and_weighs_nothing(self):
    self.write('a.txt')
    self.write('b.png', 'c.bin', content=b'\x89P\xff\0' * 9999)
    names, line = self.read()
    self.assertEqual(names, ['a.txt'])
    self.assertIn('2 not text (b.png, c.bin)', line)

  def test_json_is_read_where_it_is_a_list_or_lines_of_records(self):
    texts = ['a.json 0', 'a.json 1\u2028\n', 'a.json 2']
    records = [{'n': [1, {}], 'text': text} for text in texts]
    for content in (
      json.dumps(records),
      json.dumps(records, indent=2),
      '\ufeff \n' + json.dumps(records) + ' \n',
      '\n'.join(map(json.dumps, records)),
    ):
      self.write('a.json', content=content)
      docs = list(corpus.documents(self.root))
      self.assertEqual([doc.text for doc in docs], texts)
      self.assertLen({doc.name for doc in docs}, 3)

  def test_json_without_records_is_left_out_in_a_folder_and_refused_alone(self):
    self.write('a.txt', content='a.txt ' * 99)
    for content in ('{\n "text": "a"\n}', '[1]', '[]', '{}', '"x"', '[', '{"'):
      self.write('a.json', content=content)
      names, line = self.read()
      self.assertEqual(names, ['a.txt'])
      self.assertIn('1 JSON that is no list or lines of records', line)
      self.assert_refused('a.json', root=self.path('a.json'))

  @parameterized.parameters(
    ('[{"text": "a"}, {"text"', 'record 1 is not JSON'),
    ('[{"text": "a"} {"text": "b"}]', 'record 0 is not followed by'),
    ('[{"text": "a"}] tail', 'record 0 is not followed by'),
    ('[{"text": "a"}, 3', 'record 1 is not JSON'),
    ('[{"text": "a"}, {"x": 1}]', "record 1 has no string 'text'"),
    ('[{"text": "a"}, ' + '[' * 99999, 'record 1 is nested too deeply'),
    ('{"text": "a"}\n{"text', 'line 2 is not JSON'),
  )
  def test_records_that_go_wrong_are_refused_by_number(self, content, what):
    self.write('a.json', content=content)
    self.assert_refused('a.json', what)

  def test_a_run_and_a_token_store_below_the_text_are_left_out(self):
    self.write('a.txt')
    run = {'model': {}, 'data': {}, 'train': {}}
    self.write('runs/x/config.json', content=json.dumps(run))
    self.write('runs/x/metrics.jsonl', content='{"step": 1}\n')
    self.write('runs/x/notes.txt', 'runs/x/checkpoints/1/x.txt')
    self.write('cache/tokens/k/train.bin', 'cache/tokens/k/heldout.bin')
    self.write('cache/tokens/k/index.json', content='{}')
    names, line = self.read()
    self.assertEqual(names, ['a.txt'])
    self.assertIn("1 a run's folder (runs/x/)", line)
    self.assertIn('1 a token store (cache/tokens/k/)', line)

  def test_metrics_beside_a_configuration_of_others_are_text(self):
    self.write('config.json', content='{"a": 1}')
    self.write('metrics.jsonl')
    self.assertEqual(self.read()[0], ['metrics.jsonl'])

  def test_what_is_no_regular_file_is_named_and_never_opened(self):
    self.write('a.txt')
    os.mkfifo(self.path('fifo.txt'))
    os.symlink('/dev/zero', self.path('zero.txt'))
    os.symlink('nowhere', self.path('gone'))
    os.symlink('self', self.path('self'))
    os.mkfifo(self.path('config.json'))
    self.write('metrics.jsonl')
    names, line = self.read()
    self.assertEqual(names, ['a.txt', 'metrics.jsonl'])
    self.assertIn('5 no regular file (config.json, fifo.txt, gone, …)', line)
    for name in ('fifo.txt', 'zero.txt'):
      self.assert_refused(name, 'no regular file', root=self.path(name))
    os.symlink('loop.txt', self.path('loop.txt'))
    self.assert_refused('loop.txt', 'symbolic links')

  def test_links_to_folders_above_and_twice_are_named_and_not_read(self):
    self.write('far.txt', 'in/a.txt', 'in/sub/b.txt')
    os.symlink('..', self.path('in/up'))
    os.symlink('../..', self.path('in/sub/up'))
    os.symlink('.', self.path('in/sub/same'))
    os.symlink('/', self.path('in/sub/top'))
    os.symlink('a.txt', self.path('in/again.txt'))
    names, line = self.read(self.path('in'))
    self.assertEqual(names, ['a.txt', 'sub/b.txt'])
    self.assertIn('3 link to a folder above', line)
    self.assertIn('2 read under another name', line)

  def test_names_that_are_not_utf8_are_read(self):
    name = b'caf\xe9\n.txt'
    with open(os.path.join(os.fsencode(self.root), name), 'w') as file:
      file.write('text')
    os.mkdir(os.path.join(os.fsencode(self.root), b'\xff'))
    self.write(os.fsdecode(b'\xff/a.jsonl'), content=record('é'))
    self.write('b.parquet')
    os.rename(self.path('b.parquet'), self.path(os.fsdecode(b'\xff/b.parquet')))
    self.write(os.fsdecode(b'\xfe.png'), content='')
    self.write(os.fsdecode(b'\xfe.png'), content=b'\x89P\0')
    out = LeftOut('DIR')
    docs = list(corpus.documents(self.root, out))
    names = [doc.name for doc in docs]
    expected = ['caf\\xe9\n.txt', '\\xff/a.jsonl:1', '\\xff/b.parquet:0']
    self.assertEqual(names, expected)
    self.assertIn('(\\xfe.png)', out.line())
    for doc in docs:
      doc.name.encode()
    with open(os.path.join(os.fsencode(self.root), name), 'wb') as file:
      file.write(b'\xff')
    self.assert_refused('caf\\xe9\\n.txt is not UTF-8')


if __name__ == '__main__':
  absltest.main()
