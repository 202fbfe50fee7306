"""Bugs of which files are text, and on which side of the split."""

from tests.mutants.mutant import Mutant

_DATASETS = 'deepseek_jax/data/datasets.py'
_FILES = 'deepseek_jax/data/corpus_files.py'
_TABLES = 'deepseek_jax/data/columnar.py'
_FILES_TEST = 'tests/data/corpus_files_test.py'
_READERS_TEST = 'tests/data/readers_test.py'

MUTANTS = (
  Mutant(
    'dataset_card_trained_on',
    _DATASETS,
    '    if self._is_card(parts):\n      return left_out.CARD\n',
    '',
    (f'{_FILES_TEST}::a_card_beside_data',),
    'a README.md beside parquet files was document 1 of the training set',
    fast=True,
  ),
  Mutant(
    'validation_split_trained_on',
    _DATASETS,
    "_OTHER = {'validation', 'valid', 'val', 'dev'}",
    "_OTHER = {'valid', 'val', 'dev'}",
    (f'{_FILES_TEST}::other_splits_than_train',),
    'validation-*.parquet beside train-*.parquet',
  ),
  Mutant(
    'git_lfs_pointer_read_as_text',
    _FILES,
    '    _check_pointer(file)\n    seen.add(each.real)\n',
    '    seen.add(each.real)\n',
    (f'{_FILES_TEST}::a_pointer_of_git_lfs',),
    'a clone without git-lfs trains on three lines a file',
  ),
  Mutant(
    'every_revision_of_a_hub_cache_read',
    _DATASETS,
    '  folders[:] = [chosen]\n',
    '',
    (f'{_FILES_TEST}::cache_of_the_hub_the_main_revision',),
    'two snapshots: what one holds out the other trains on',
  ),
  Mutant(
    'cached_arrow_files_read_beside_the_dataset',
    _DATASETS,
    'parts[-1] not in self._listed[at]',
    'False',
    (f'{_FILES_TEST}::a_saved_dataset_is_its_listed_files',),
    'datasets keeps cache-*.arrow of map() beside what it saves',
  ),
  Mutant(
    'most_of_a_folder_left_out_in_silence',
    'deepseek_jax/data/left_out.py',
    'if self._bytes > size:',
    'if False:',
    (f'{_FILES_TEST}::more_text_left_out_than_read',),
    'part.jsonl.xz beside notes.txt trained on the notes',
  ),
  Mutant(
    'copies_on_both_sides_of_the_split',
    'deepseek_jax/data/windows.py',
    '      held = corpus.is_held_out(doc.text, config.heldout_fraction)\n'
    '      cut',
    '      held = corpus.is_held_out(doc.name, config.heldout_fraction)\n'
    '      cut',
    (f'{_READERS_TEST}::copies_of_a_text',),
    'a held-out document that is also trained on',
    fast=True,
  ),
  Mutant(
    'parquet_read_by_large_batches',
    _TABLES,
    'file.iter_batches(batch_size=_ROWS,',
    'file.iter_batches(batch_size=65_536,',
    (f'{_READERS_TEST}::a_small_parquet_of_much_text',),
    'a file of 10 MB took 1.1 GB',
  ),
)
