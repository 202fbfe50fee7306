"""experiments.sample of a published folder says what transformers says."""

import json
import os
import subprocess
import sys
import tempfile

import pytest
from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax import hf
from deepseek_jax.data import boundaries, tokenizer
from tests import tokenizer_folders as folders
from tests.hf import hf_models

_LLAMA = ds.changed(hf_models.LLAMA, {'vocab_size': 330})
_NEW = 12


def _start(*flags):
  return subprocess.Popen(
    [
      *(sys.executable, '-m', 'experiments.sample', '--temperature=0'),
      *(f'--max_new_tokens={_NEW}', *flags),
    ],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def _write(folder, name, value):
  with open(os.path.join(folder, name), 'w') as file:
    json.dump(value, file)


class SampleTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())
    hf.save(
      self.folder,
      _LLAMA,
      hf_models.variables(_LLAMA),
      dtype='float32',
      extra={'eos_token_id': [1], 'bos_token_id': 0},
    )
    with open(os.path.join(self.folder, 'config.json')) as file:
      config = json.load(file)
    names = {'add_bos_token': True, 'tokenizer_class': 'LlamaTokenizerFast'}
    folders.save(
      self.folder, folders.byte_level(folders.BOS), names=names, config=config
    )

  def theirs(self):
    import transformers

    auto = transformers.AutoTokenizer.from_pretrained(self.folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(self.folder)
    return auto, model.eval()

  def generated(self, auto, model, **inputs):
    """New ids that transformers generates greedily."""
    n = inputs['input_ids'].shape[1]
    out = model.generate(
      input_ids=inputs['input_ids'], max_new_tokens=_NEW, do_sample=False
    )
    return out[0, n:].tolist()

  def test_begins_and_ends_as_transformers(self):
    auto, model = self.theirs()
    prompt, said = 'hello world', 'the fox'
    asked = auto(prompt, return_tensors='pt')
    self.assertEqual(asked['input_ids'][0, 0], 0)
    talk = [{'role': 'user', 'content': said}]
    talked = auto.apply_chat_template(
      talk, add_generation_prompt=True, return_tensors='pt', return_dict=True
    )
    free = self.generated(auto, model, **asked)
    talked_free = self.generated(auto, model, **talked)
    self.assertLen(free, _NEW)
    # Now two later tokens end it, by generation_config.json alone.
    ends = [1, free[5], talked_free[3]]
    _write(self.folder, 'generation_config.json', {'eos_token_id': ends})
    auto, model = self.theirs()
    ids = self.generated(auto, model, **asked)
    talked_ids = self.generated(auto, model, **talked)
    self.assertLess(len(ids), _NEW)
    self.assertLess(len(talked_ids), _NEW)

    runs = [
      _start(f'--hf={self.folder}', f'--prompt={prompt}'),
      _start(f'--hf={self.folder}', '--chat'),
      _start(f'--hf={self.folder}', f'--prompt={prompt}', '--bos=no'),
    ]
    alone, chat, bare = [
      run.communicate(f'{said}\n' if n == 1 else '', timeout=300)
      for n, run in enumerate(runs)
    ]
    self.assertEqual([run.returncode for run in runs], [0] * 3, msg=alone)
    self.assertEqual(alone[0], f'{prompt}{auto.decode(ids[:-1])}\n')
    answer = auto.decode(talked_ids[:-1])
    self.assertEqual(chat[0], f'> {answer}\n> ')
    self.assertNotEqual(bare[0], alone[0])

  @pytest.mark.slow
  def test_a_store_begins_and_ends_as_its_folder(self):
    store = os.path.join(self.folder, 'store')
    back = os.path.join(self.folder, 'back')
    _write(self.folder, 'generation_config.json', {'eos_token_id': [1, 5]})
    for source, target in ((self.folder, store), (store, back)):
      subprocess.run(
        [
          *(sys.executable, '-m', 'experiments.convert'),
          *(f'--from={source}', f'--to={target}', '--dtype=float32'),
        ],
        check=True,
        capture_output=True,
      )
    runs = [
      _start(f'--hf={folder}', '--prompt=hello world')
      for folder in (self.folder, store)
    ]
    outs = [run.communicate(timeout=300) for run in runs]
    self.assertEqual(outs[0], outs[1])
    self.assertEqual([run.returncode for run in runs], [0, 0], msg=outs)
    tok = tokenizer.from_file(back)
    found = boundaries.boundaries(back, tok)
    self.assertEqual((found.begins, found.ends), ((0,), (1, 5)))


if __name__ == '__main__':
  absltest.main()
