"""Reads finished runs: arms, held-out text, exports, a talk."""

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax import data as datalib
from deepseek_jax.data import from_file
from deepseek_jax.infer import chat
from deepseek_jax.run import held_out as held_outs
from tests import tokenizer_folders as folders
from tests.hf import hf_models
from tests.rl.sft_run_test import TINY

_LLAMA = ds.changed(hf_models.LLAMA, {'vocab_size': 330})


def _run(folder, name, scoring, seed, value):
  path = Path(folder, name)
  path.mkdir()
  config = {'model': {'scoring': scoring}, 'data': {'seed': seed}, 'seed': seed}
  (path / 'config.json').write_text(json.dumps(config))
  rows = [{'step': 1, 'bits': 9.0}, {'step': 2, 'bits': value}]
  lines = ''.join(json.dumps(row) + '\n' for row in rows)
  (path / 'metrics.jsonl').write_text(lines)
  return path


class ArmsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())
    # Fields of later versions are filled in elsewhere.
    self.enterContext(
      mock.patch('deepseek_jax.run.folder.filled', lambda written: written)
    )
    for seed, (a, b) in enumerate(((2.0, 1.0), (3.0, 2.25))):
      _run(self.folder, f'0-{seed}', 'sigmoid', seed, a)
      _run(self.folder, f'1-{seed}', 'softmax', seed, b)

  def test_seeds_are_one_arm_and_differences_are_paired(self):
    arms = ds.read_arms(self.folder)
    self.assertEqual([len(arm.runs) for arm in arms], [2, 2])
    values = [[ds.last_value(r, 'bits') for r in arm.runs] for arm in arms]
    self.assertEqual(values, [[2.0, 3.0], [1.0, 2.25]])
    [difference] = ds.differences(arms, 'bits')
    self.assertEqual(difference.interval, ds.interval([-1.0, -0.75]))

  def test_a_metric_that_no_run_has_is_named(self):
    arms = ds.read_arms(self.folder)
    with self.assertRaisesRegex(
      ds.InputError, "metric = 'bots': no run has it; they have bits"
    ):
      ds.differences(arms, 'bots')
    with self.assertRaisesRegex(ds.InputError, "entry: is 'a'; give a run of"):
      ds.last_value('a', 'bits')
    with self.assertRaisesRegex(ds.InputError, 'values: there are none'):
      ds.interval([])

  def test_paths_may_be_several_and_of_either_type(self):
    paths = [os.path.join(self.folder, '0-0'), Path(self.folder, '1-0')]
    self.assertLen(ds.read_arms(paths), 2)
    self.assertLen(ds.read_arms(Path(self.folder)), 2)
    for wrong in (3, None, [self.folder, 3]):
      with self.assertRaisesRegex(
        ds.InputError, 'runs: is .*; give the folder'
      ):
        ds.read_arms(wrong)
    with self.assertRaisesRegex(ds.InputError, 'holds no run'):
      ds.read_arms(tempfile.mkdtemp(dir=self.folder))


class HeldOutTest(absltest.TestCase):
  def test_a_run_that_reads_no_text_is_refused(self):
    with self.assertRaisesRegex(ds.InputError, 'run: is 3; give what ds.fit'):
      ds.held_out(3)
    run = mock.Mock(store=object())
    with self.assertRaisesRegex(ds.InputError, 'held_out: this run reads no'):
      ds.held_out(run)

  def test_nothing_is_held_out(self):
    store = mock.Mock(spec=datalib.TokenStore)
    store.heldout_documents.return_value = []
    self.assertIsNone(ds.held_out(mock.Mock(store=store)))
    self.assertIs(held_outs.datalib.TokenStore, datalib.TokenStore)


class TalkTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())
    self.variables = hf_models.variables(_LLAMA)
    ds.hf.save(
      self.folder,
      _LLAMA,
      self.variables,
      dtype='float32',
      extra={'eos_token_id': [1], 'bos_token_id': 0},
    )
    config = json.loads(Path(self.folder, 'config.json').read_text())
    names = {'add_bos_token': True, 'chat_template': folders.TEMPLATE}
    made = folders.byte_level(folders.BOS)
    folders.save(self.folder, made, names=names, config=config)

  def greedy(self, messages):
    """Returns the likeliest answer to messages, by plain decoding."""
    config = chat.template_config(self.folder)
    tokenizer = from_file(self.folder)
    prompt = tokenizer.encode(chat.render(config, messages), special=True)
    [drawn] = ds.generate(
      ds.build(_LLAMA),
      self.variables,
      [prompt],
      max_new_tokens=6,
      temperature=0.0,
      key=jax.random.key(0),
    )
    ids = [int(t) for t in drawn]
    ids = ids[: ids.index(1)] if 1 in ids else ids
    return tokenizer.decode(ids)

  def test_answers_are_the_likeliest_turn_after_turn(self):
    asked = ['hello', 'def f(x)']
    with mock.patch('builtins.print'):
      said = ds.talk(self.folder, asked, max_new_tokens=6, context=128)
    self.assertEqual([m['content'] for m in said[::2]], asked)
    for turn in (1, 3):
      self.assertEqual(said[turn]['content'], self.greedy(said[:turn]))

  def test_a_single_text_is_refused(self):
    for wrong in ('hello', 3, ['hello', 3], None):
      with self.assertRaisesRegex(ds.InputError, 'questions: is .*; give a'):
        ds.talk(self.folder, wrong)
    with self.assertRaisesRegex(ds.InputError, 'folder: is 3; give a Hugging'):
      ds.talk(3)

  def test_a_folder_without_a_template_is_named(self):
    path = Path(self.folder, 'tokenizer_config.json')
    names = json.loads(path.read_text())
    del names['chat_template']
    path.write_text(json.dumps(names))
    with self.assertRaisesRegex(ds.InputError, 'this model has no chat format'):
      ds.talk(self.folder, ['hello'])


class ExportTest(absltest.TestCase):
  def test_a_run_without_a_checkpoint_is_named(self):
    folder = self.enterContext(tempfile.TemporaryDirectory())
    with self.assertRaisesRegex(ds.InputError, 'holds no run'):
      ds.export_run(folder, Path(folder, 'out'))
    with self.assertRaisesRegex(ds.InputError, 'target: is 3; give the folder'):
      ds.export_run(folder, 3)

  def test_the_folder_has_the_runs_weights_and_tokenizer(self):
    model = dataclasses.replace(TINY, vocab_size=270)
    variables = ds.build(model).init(0)
    tokenizer = datalib.ByteTokenizer()
    run = mock.Mock(step=3, variables=variables, tokenizer=tokenizer)
    run.config.model, run.config.data.seq_len = model, 32
    with (
      tempfile.TemporaryDirectory() as folder,
      mock.patch('deepseek_jax.run.folder.load', return_value=run),
    ):
      ds.export_run('run', Path(folder, 'out'))
      config, there = ds.hf.load(os.path.join(folder, 'out'))
      about = json.loads(Path(folder, 'out/generation_config.json').read_text())
    self.assertEqual(about['eos_token_id'], [tokenizer.eos_id])
    tokens = np.arange(6)[None]
    ours = ds.build(model).apply(variables, tokens).logits
    theirs = ds.build(config).apply(there, tokens).logits
    np.testing.assert_allclose(theirs, ours, atol=1e-5)


if __name__ == '__main__':
  absltest.main()
