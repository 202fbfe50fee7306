"""Decides what of a Hugging Face dataset's folder is text to be trained on.

    data/train-00000-of-00002.parquet, train.jsonl, train/…   the split is in
      the name, by the words that the hub looks for
    README.md                     the card; `configs` in it may name the splits
    dataset_info.json, state.json, data-*.arrow   saved by Dataset.save_to_disk
    dataset_dict.json, train/, …  saved by DatasetDict.save_to_disk
    snapshots/, refs/, blobs/     the hub's cache: one folder for each revision

Folders that runs of this library write are no text either.
"""

import fnmatch
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from deepseek_jax.data import left_out, readers
from deepseek_jax.data.left_out import LeftOut
from deepseek_jax.errors import InputError

_TRAIN = {'train', 'training'}
_OTHER = {'validation', 'valid', 'val', 'dev'}
_OTHER |= {'test', 'testing', 'eval', 'evaluation'}
_CARDS = ('readme.md', 'readme.txt')
_DESCRIPTIONS = ('dataset_info.json', 'dataset_infos.json')
_DICT, _STATE = 'dataset_dict.json', 'state.json'
# A card of the hub begins with YAML; other front matter has other keys.
_HUB_KEYS = re.compile(
  r'^(annotations_creators|base_model|configs|dataset_info|language|library_'
  r'name|license|pretty_name|size_categories|tags|task_categories):',
  re.MULTILINE,
)
_CARD_BYTES = 1 << 20  # front matter of more is not looked at


def folder_reason(
  folder: str, folders: Sequence[str], names: Iterable[str]
) -> str | None:
  """Returns why nothing below a folder is read, by what lies in it, or None."""
  names = set(names)
  if {'index.json', 'train.bin', 'heldout.bin'} <= names:
    return left_out.STORE
  if 'config.json' in names and (
    'checkpoints' in folders or 'metrics.jsonl' in names
  ):
    config = _object(os.path.join(folder, 'config.json'))
    if config and {'model', 'data', 'train'} <= config.keys():
      return left_out.RUN
  at = os.path.basename(folder)
  if _is_hub_cache(folders) and at.startswith(('models--', 'spaces--')):
    return left_out.MODEL
  return None


def keep_one_revision(
  folder: str, parts: tuple[str, ...], folders: list, out: LeftOut
) -> None:
  """Drops what is not to be read from the subfolders of a cache of the hub.

  Edits `folders`. Raises InputError if nothing says which revision is meant.
  """
  if _is_hub_cache(folders):
    folders[:] = ['snapshots']  # they link to the blobs
    return
  at, name = os.path.split(folder)
  if name != 'snapshots' or not os.path.isdir(os.path.join(at, 'refs')):
    return
  chosen = _main(os.path.join(at, 'refs', 'main'))
  if chosen not in folders:
    if len(folders) > 1:
      raise InputError(
        f'data.path: {left_out.shown(folder)} holds {len(folders)} revisions'
        f' and refs/main is none of them: give one ({", ".join(folders)})'
      )
    return
  for other in folders:
    if other != chosen:
      out.add(left_out.REVISION, '/'.join((*parts, other)) + '/')
  folders[:] = [chosen]


def _is_hub_cache(folders: Iterable[str]) -> bool:
  """Returns whether these folders are a repository in the hub's cache."""
  return 'snapshots' in folders and bool({'refs', 'blobs'} & set(folders))


def _main(path: str) -> str | None:
  """Returns the revision that refs/main names; None if it can't be read."""
  try:
    return readers.head(path, 100).decode('utf-8', 'replace').strip()
  except InputError:
    return None


class _Card(NamedTuple):
  """Describes what a dataset's card says of files and splits."""

  hub: bool  # begins as cards of the hub do
  train: list[str]  # patterns of files
  other: list[str]


class Rules:
  """Finds why a file of a corpus is not read, for each that is not.

  files: parts of the path below data.path -> path, of all files.
  records: parts of those that hold records.
  """

  def __init__(self, files: dict[tuple[str, ...], str], records: set[tuple]):
    """Reads the cards and descriptions among the files."""
    self._records = records
    self._record_folders = {parts[:-1] for parts in records}
    self._folders: dict[tuple, set[str]] = {}
    for parts in files:
      self._folders.setdefault(parts[:-1], set()).add(parts[-1])
    self._cards: dict[tuple, _Card] = {}
    self._patterns: dict[tuple, _Card] = {}  # of folders
    self._listed: dict[tuple, set[str]] = {}  # .arrow files of saved datasets
    self._splits: dict[tuple, tuple[str, ...]] = {}  # that are read
    for parts, path in files.items():
      at, name = parts[:-1], parts[-1].lower()
      if name in _CARDS:
        card = self._cards[parts] = _card(path)
        if card.train or card.other:
          self._patterns[at] = card
      elif name == _STATE and self._described(at):
        self._listed[at] = self._data_files(path, at)
      elif name == _DICT:
        self._splits[at] = _kept_splits(path)
    # Folders in which a file or a folder says that it is the training split.
    self._trained_files = {
      p[:-1] for p in files if _split(_stem(p[-1])) == 'train'
    }
    self._trained_folders = {
      p[:i] for p in files for i in range(len(p) - 1) if _split(p[i]) == 'train'
    }

  def reason(self, parts: tuple[str, ...]) -> str | None:
    """Returns why a file is not read, one of left_out's; None if it is."""
    at, name = parts[:-1], parts[-1].lower()
    if self._is_card(parts):
      return left_out.CARD
    if name in _DESCRIPTIONS or name == _DICT or at in self._listed:
      if name in (*_DESCRIPTIONS, _DICT, _STATE):
        return left_out.DESCRIPTION
      if name.endswith('.arrow') and parts[-1] not in self._listed[at]:
        return left_out.CACHE
    if fnmatch.fnmatch(name, 'cache-*.arrow') and self._described(at):
      return left_out.CACHE
    return left_out.SPLIT if self._is_held(parts) else None

  def _described(self, at: tuple[str, ...]) -> bool:
    """Returns whether a dataset_info.json lies in a folder."""
    return 'dataset_info.json' in self._folders[at]

  def _is_card(self, parts: tuple[str, ...]) -> bool:
    """Returns whether a file is a dataset's card, not a text of that name."""
    if parts not in self._cards:
      return False
    at = parts[:-1]
    dataset = at in self._record_folders or at in self._splits
    described = not self._folders[at].isdisjoint(_DESCRIPTIONS)
    return self._cards[parts].hub or dataset or described

  def _is_held(self, parts: tuple[str, ...]) -> bool:
    """Returns whether a file is of another split than train."""
    for at, kept in self._splits.items():
      inner = parts[len(at) : -1]
      if parts[: len(at)] == at and inner:
        return inner[0] not in kept
    if parts not in self._records:
      return self._is_held_text(parts)
    # The card decides, then the file's name, then the nearest folder's.
    said = self._by_card(parts) or _split(_stem(parts[-1]))
    folders = (_split(part) for part in reversed(parts[:-1]))
    return (said or next(filter(None, folders), None)) == 'other'

  def _is_held_text(self, parts: tuple[str, ...]) -> bool:
    """Returns whether a text file is of another split than train.

    Prose and code may be called test: it counts beside what is called train.
    """
    code = readers.kind_of(parts[-1])[0] in ('.py', '.md')
    if _split(_stem(parts[-1])) == 'other' and not code:
      return parts[:-1] in self._trained_files
    return any(
      _split(parts[i]) == 'other' and parts[:i] in self._trained_folders
      for i in range(len(parts) - 1)
    )

  def _by_card(self, parts: tuple[str, ...]) -> str | None:
    """Returns what the card of a folder above says of a file's split."""
    for depth in range(len(parts) - 1, -1, -1):
      card, inner = self._patterns.get(parts[:depth]), '/'.join(parts[depth:])
      if card and any(fnmatch.fnmatch(inner, p) for p in card.train):
        return 'train'
      if card and any(fnmatch.fnmatch(inner, p) for p in card.other):
        return 'other'
    return None

  def _data_files(self, path: str, at: tuple[str, ...]) -> set[str]:
    """Returns the .arrow files that a saved dataset consists of."""
    state = _object(path)
    try:
      names = {str(file['filename']) for file in state['_data_files']}
      indices = state.get('_indices_data_files') or state.get('_indices_files')
    except (TypeError, LookupError, AttributeError):
      raise InputError(
        f'data.path: {left_out.shown(path)} is not what datasets saves: save'
        ' the dataset again'
      ) from None
    missing = sorted(names - self._folders[at])
    if missing or indices:
      what = f'{missing[0]} is missing' if missing else 'it selects rows'
      raise InputError(
        f'data.path: {left_out.shown(path)} is no whole dataset ({what}):'
        ' save it again'
      )
    return names


def _stem(name: str) -> str:
  """Returns a file's name without its kind and packing."""
  kind, packed = readers.kind_of(name)
  return name[: len(name) - len(kind) - len(packed)]


def _split(name: str) -> str | None:
  """Returns 'train' or 'other' by the last word of a name that says one."""
  for word in reversed(re.split(r'[-._ 0-9]+', name.lower())):
    if word in _TRAIN:
      return 'train'
    if word in _OTHER:
      return 'other'
  return None


def _kept_splits(path: str) -> tuple[str, ...]:
  """Returns the folders of a saved DatasetDict that are read."""
  splits = (_object(path) or {}).get('splits')
  if not isinstance(splits, list) or not splits:
    raise InputError(
      f'data.path: {left_out.shown(path)} lists no splits: save the dataset'
      ' again'
    )
  if 'train' not in splits and len(splits) > 1:
    raise InputError(
      f'data.path: {left_out.shown(path)} has no split train but'
      f' {", ".join(map(str, splits))}: give the folder of one'
    )
  return ('train',) if 'train' in splits else tuple(splits)


def _object(path: str) -> dict | None:
  """Returns the JSON object in a file, or None."""
  try:
    made = json.loads(readers.head(path, 1 << 24))
  except (ValueError, RecursionError):
    return None
  return made if isinstance(made, dict) else None


def _card(path: str) -> _Card:
  """Reads a card: whether it is the hub's, and its patterns by split."""
  text = readers.head(path, _CARD_BYTES).decode('utf-8', 'replace')
  text = text.removeprefix('\ufeff').replace('\r\n', '\n')
  matter, end, _ = text.removeprefix('---\n').partition('\n---')
  if not text.startswith('---\n') or not end or not _HUB_KEYS.search(matter):
    return _Card(False, [], [])
  patterns = {'train': [], 'other': []}
  for split, pattern in _data_files(matter):
    patterns['train' if split == 'train' else 'other'].append(pattern)
  return _Card(True, patterns['train'], patterns['other'])


def _data_files(matter: str) -> Iterator[tuple[str, str]]:
  """Yields (split, pattern) of the `configs` in a card's front matter."""
  inside, split, listing = False, None, False
  for line in matter.splitlines():
    if re.match(r'\w', line):
      inside = line.startswith('configs:')
    found = re.match(r'\s*-?\s*(split|path|config_name):\s*(.*?)\s*$', line)
    item = re.match(r'\s*-\s+(.+?)\s*$', line)
    if not inside:
      continue
    if found:
      # Read by lines: no YAML parser is needed for what the hub writes.
      key, value = found[1], found[2].strip('\'"')
      listing = key == 'path' and not value
      if key == 'split':
        split = value
      elif key == 'config_name':
        split = None
      elif value and split:
        yield split, value.replace('**', '*')
    elif item and listing and split:
      yield split, item[1].strip('\'"').replace('**', '*')
