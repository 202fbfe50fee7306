"""Fine-tuning as a run: packed conversations, resumed, adapters, launcher."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.data.tokenizer import ByteTokenizer
from deepseek_jax.model import lora
from deepseek_jax.rl import conversation_store
from deepseek_jax.run import sources
from deepseek_jax.train import evaluate
from tests.serve import served as servers

ROOT = Path(__file__).parents[2]
TINY = ds.changed(
  ds.presets.v3_tiny(),
  {
    'vocab_size': 261,
    'dim': 16,
    'layout': ((('dense',), 1),),
    'attention.q_rank': 8,
    'attention.kv_rank': 8,
    'attention.heads': 2,
    'attention.nope_dim': 8,
    'attention.rope_dim': 4,
    'attention.v_dim': 8,
    'ffn.width': 16,
    'mtp.depth': 0,
  },
)


class Folder:
  """A folder with a file of conversations."""

  def __init__(self, test, count=40):
    self.path = tempfile.mkdtemp()
    test.addCleanup(shutil.rmtree, self.path)
    with open(os.path.join(self.path, 'chats.jsonl'), 'w') as file:
      for n in range(count):
        answer = str(2 * n)
        file.write(json.dumps({'prompt': f'{n}+{n}=', 'completion': answer}))
        file.write('\n')

  def config(self, **changes):
    data = ds.DataConfig(
      path=os.path.join(self.path, 'chats.jsonl'),
      tokenizer='bytes',
      vocab_size=261,
      seq_len=24,
      fim_rate=0.0,
      heldout_fraction=0.2,
    )
    train = ds.TrainConfig(
      24 * 4 * 6,
      ds.BatchConfig(4),
      schedule=ds.ScheduleConfig('constant', peak=1e-2, warmup=0),
    )
    made = ds.RunConfig(
      TINY,
      data,
      train,
      objective=ds.SFTConfig(),
      chat=ds.ChatConfig('plain'),
      checkpoint_every=3,
    )
    return ds.changed(made, changes)

  def store(self, **changes):
    return sources.opened(self.config(**changes), lambda line: None)


class StoreTest(parameterized.TestCase):
  def test_every_example_is_read_once_an_epoch(self):
    folder = Folder(self)
    store = folder.store()
    self.assertLen(store.train + store.heldout, 40)
    rows = sources.batches(store, folder.config())
    epoch = rows.next(rows.windows)
    learnt = (epoch['trained'] > 0) & (epoch['segments'] > 0)
    want = sum(int(e.trained.sum()) for e in store.train)
    self.assertEqual(learnt.sum(), want)
    self.assertLess(rows.windows, len(store.train) / 2)  # packed

  def test_batches_go_on_from_their_state_and_by_process(self):
    folder = Folder(self)
    store, config = folder.store(), folder.config()
    whole = sources.batches(store, config)
    first, second = whole.next(4), whole.next(4)
    again = sources.batches(store, config)
    again.next(4)
    state = again.get_state()
    other = sources.batches(store, config)
    other.set_state(json.loads(json.dumps(state)))
    halves = [sources.batches(store, config).next(4, i, 2) for i in (0, 1)]
    for name in first:
      np.testing.assert_array_equal(other.next(4)[name], second[name])
      other.set_state(state)
      joined = np.concatenate([h[name] for h in halves])
      np.testing.assert_array_equal(joined, first[name])

  @parameterized.parameters(
    ('v4', (False, False), None, 'no answer has reasoning.*thinking = False'),
    ('v3', (True, True), None, 'every answer has reasoning.*thinking = True'),
    ('v4', (True, False), None, ''),
    ('v4', (False, False), False, ''),
    ('v3', (False, False), None, ''),
    ('plain', (False, False), None, ''),
  )
  def test_turns_that_are_asked_otherwise_are_named(
    self, form, reasoned, thinking, want
  ):
    folder, said = Folder(self), []
    with open(os.path.join(folder.path, 'chats.jsonl'), 'w') as file:
      for n, reasons in enumerate(reasoned):
        answer = {'role': 'assistant', 'content': 'b'}
        answer |= {'reasoning_content': 'r'} if reasons else {}
        asked = {'role': 'user', 'content': f'{n}'}
        file.write(json.dumps({'messages': [asked, answer]}) + '\n')
    tokenizer = servers.deepseek_tokenizer()
    tokenizer.save(folder.path)
    config = folder.config(
      **{
        'chat.format': form,
        'chat.thinking': thinking,
        'data.tokenizer': os.path.join(folder.path, 'tokenizer.json'),
        'model.vocab_size': tokenizer.vocab_size,
        'data.vocab_size': tokenizer.vocab_size,
        'data.heldout_fraction': 0.0,
      }
    )
    sources.opened(config, said.append)
    self.assertRegex(''.join(said[1:]), f'^chat.*{want}' if want else '^$')

  def test_what_is_asked_is_on_one_side(self):
    folder = Folder(self)
    path = os.path.join(folder.path, 'chats.jsonl')
    lines = Path(path).read_text().splitlines()
    Path(path).write_text('\n'.join(lines + lines))
    store = folder.store()
    prompts = lambda some: {
      ByteTokenizer().decode(e.tokens[e.trained == 0]) for e in some
    }
    both = prompts(store.train) & prompts(store.heldout)
    self.assertEqual(both, set())
    self.assertNotEmpty(store.heldout)

  def test_another_chat_or_file_is_another_stream(self):
    folder = Folder(self)
    state = sources.batches(folder.store(), folder.config()).get_state()
    changes = {'chat.format': 'r1_zero', 'data.seq_len': 700}
    config = folder.config(**changes)
    batches = sources.batches(folder.store(**changes), config)
    with self.assertRaisesRegex(ds.InputError, 'not those that the saved run'):
      batches.set_state(state)

  @parameterized.parameters(
    ({'data.tokenizer': 'bpe'}, "data.tokenizer = 'bpe'"),
    ({'data.vocab_size': 100}, 'data.vocab_size = 100: the tokenizer has'),
    ({'data.path': '/nowhere'}, 'does not exist'),
    ({'data.seq_len': 2}, 'no example is left to train on'),
    ({'chat.format': 'v3'}, r'line 1: tokenizer: lacks .*User'),
  )
  def test_what_does_not_fit_is_named(self, changes, message):
    with self.assertRaisesRegex(ds.InputError, message):
      Folder(self).store(**changes)

  def test_a_template_needs_its_folder(self):
    for fields in ({'format': 'template'}, {'folder': 'x'}):
      with self.assertRaisesRegex(ds.InputError, 'chat.folder = '):
        ds.ChatConfig(**fields)

  def test_counts_are_said(self):
    folder, said = Folder(self), []
    config = folder.config(**{'data.seq_len': 5})
    conversation_store.build(config.data, config.chat, say=said.append)
    self.assertRegex(said[0], '40 conversations: .* cut at the limit, ')


class RunTest(absltest.TestCase):
  def test_a_run_learns_and_goes_on_as_if_never_stopped(self):
    folder = Folder(self)
    config = folder.config()
    whole = ds.fit(config, os.path.join(folder.path, 'a'), console=False)
    losses = [
      r['loss'] for r in ds.read_metrics(os.path.join(folder.path, 'a'))
    ]
    self.assertLess(losses[-1], losses[0])
    other = os.path.join(folder.path, 'b')
    ds.fit(config, other, console=False)
    for name in os.listdir(os.path.join(other, 'checkpoints')):
      if name == '6':
        shutil.rmtree(os.path.join(other, 'checkpoints', name))
    again = ds.fit(config, other, console=False)
    for a, b in zip(
      *(map(np.asarray, _leaves(r.variables)) for r in (whole, again))
    ):
      np.testing.assert_array_equal(a, b)
    held = sources.heldout(whole.store, config, None)
    bits = evaluate.bits_per_byte(whole.model, whole.variables, held)
    self.assertGreater(bits, 0)
    # Bytes of the answers alone, ends of turns left out.
    want = sum(int(e.trained.sum()) - 1 for e in whole.store.heldout)
    self.assertEqual(held.bytes, want)

  def test_adapters_alone_learn(self):
    folder = Folder(self)
    config = folder.config(
      **{'model.lora': ds.LoRAConfig(rank=2), 'train.tokens': 24 * 4 * 1.0}
    )
    run = ds.fit(config, os.path.join(folder.path, 'a'), console=False)
    fresh = run.model.init(_key(config))
    moved = {
      lora.KEY in name
      for name, a, b in _pairs(fresh['params'], run.variables['params'])
      if not np.allclose(a, b, rtol=1e-5, atol=1e-7)
    }
    self.assertEqual(moved, {True})


def _leaves(tree):
  import jax

  return jax.tree.leaves(tree)


def _key(config):
  import jax

  return jax.random.key(config.seed)


def _pairs(a, b):
  import jax

  flat = jax.tree_util.tree_leaves_with_path
  for (path, x), (_, y) in zip(flat(a), flat(b)):
    yield jax.tree_util.keystr(path), x, y


class LauncherTest(absltest.TestCase):
  def start(self, *args):
    return subprocess.run(
      [sys.executable, '-m', 'experiments.sft', *args],
      cwd=ROOT,
      capture_output=True,
      text=True,
      timeout=600,
      env={**os.environ, 'JAX_PLATFORMS': 'cpu', 'COLUMNS': '100'},
    )

  def test_it_draws_the_mask_trains_and_reports(self):
    folder = Folder(self)
    config = os.path.join(folder.path, 'own.py')
    made = ds.to_dict(folder.config(**{'train.tokens': 24 * 4 * 1.0}))
    Path(config).write_text(
      'import deepseek_jax as ds\n'
      f'def get_config(): return ds.from_dict(ds.RunConfig, {made!r})\n'
    )
    workdir = os.path.join(folder.path, 'run')
    done = self.start(f'--config={config}', f'--workdir={workdir}')
    self.assertEqual(done.returncode, 0, done.stderr)
    self.assertRegex(done.stdout, r'what is learnt of .*chats.jsonl line')
    self.assertRegex(done.stdout, r'\n +\^\^+\n')
    self.assertIn('held-out bits per byte of answers', done.stdout)
    report = Path(workdir, 'report.html').read_text()
    self.assertIn('what is learnt', report)
    again = self.start(f'--config={config}', f'--workdir={workdir}', '--quiet')
    self.assertEqual(again.returncode, 0, again.stderr)
    self.assertIn('held-out bits per byte of answers', again.stdout)
    for word in ('what is learnt', 'reading', 'resumed'):
      self.assertNotIn(word, again.stdout)

  def test_text_is_for_pretraining(self):
    done = self.start('--config=v3_tiny', '--workdir=/tmp/never')
    self.assertEqual(done.returncode, 2)
    self.assertIn('error: chat = None: fine-tuning reads', done.stderr)
    self.assertFalse(os.path.exists('/tmp/never'))


if __name__ == '__main__':
  absltest.main()
