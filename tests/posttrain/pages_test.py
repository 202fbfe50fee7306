"""The pages of a small R1 and of self-improvement, from files made up."""

import json
import tempfile
from pathlib import Path

import numpy as np
from absl.testing import absltest

from deepseek_jax.errors import InputError
from deepseek_jax.posttrain import chain
from deepseek_jax.record.metrics import MetricsWriter
from deepseek_jax.record.report import evolve_page, r1_page
from deepseek_jax.record.routing import FlightRecorder


def reached(share):
  """Returns what a measurement leaves, its answers with a mark in them."""
  one = {
    'problems': 64,
    'greedy': share,
    'greedy_interval': [share - 0.1, share + 0.1],
    'pass': {'1': share, '16': 1.0},
    'length': 50.5,
    'in_form': 0.9,
    'truncated': 0.0,
    'verifier_errors': 0,
  }
  sample = {
    'prompt': '1+2=',
    'text': f'<u>{share}</u>',
    'right': share > 0.5,
    'kind': 'addition 2',
  }
  return {**one, 'kinds': {'addition 2': one}, 'samples': [sample], 'draws': 16}


class PagesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
    self.number = 0

  def stage(self, name, kind, **values):
    self.number += 1
    record = {'name': name, 'what': f'does {name}', 'kind': kind}
    record |= {'number': self.number, 'seconds': 61.0, **values}
    chain.write(self.folder / 'stages' / f'{name}.json', record)

  def run_folder(self, name):
    self.stage(name, 'run', steps=3, tokens=300)
    with MetricsWriter(self.folder / name, console=False) as writer:
      for step in (1, 2, 3):
        numbers = {'reward': 0.3 * step, 'kl': 0.01, 'policy_entropy': 0.5}
        writer.write(step, numbers | {'answer_length': 40.0})
    recorder = FlightRecorder(
      self.folder / name / 'routing.npz', {'load': 'sum'}, layers=[1, 2]
    )
    rng = np.random.default_rng(0)
    for step in range(1, 21):
      recorder.record(step, load=rng.integers(1, 9, (2, 4)))
    recorder.save()

  def test_the_page_holds_what_was_measured(self):
    (self.folder / 'recipe.json').write_text('{"seed": 7}')
    self.stage('2-cold', 'run', steps=3, tokens=300)
    self.stage('2-cold-measured', 'measure', **reached(0.25))
    self.run_folder('3-reinforced')
    self.stage('3-reinforced-measured', 'measure', **reached(0.75))
    folders = {'hf': {'compared': 16, 'equal': 15, 'examples': []}}
    self.stage('exported', 'file', folders=folders)
    self.stage('arm-permuted', 'arm')  # a study's, and no stage of this
    text = r1_page.write(self.folder).read_text()
    for words in (
      '25.0 % → 75.0 %', 'held out, 2-cold to 3-reinforced', '15 of 16',
      '&lt;u&gt;0.75&lt;/u&gt;', '✗', '✓', '5:05', 'Response length', 'Entropy',
      '3-reinforced, first', '3 steps, 300 tokens', '&#34;seed&#34;: 7',
    ):  # fmt: skip
      self.assertIn(words, text)
    self.assertNotIn('arm-permuted', text)
    self.assertNotIn('<u>', text)  # what a model wrote is text alone
    self.assertNotIn('http:', text)
    self.assertNotIn('https', text)
    lines = r1_page.summary(self.folder).splitlines()
    self.assertEqual(lines[1], '3-reinforced-measured: addition 2 75.0 %')

  def test_half_a_pipeline_has_a_page(self):
    (self.folder / 'recipe.json').write_text('{}')
    with self.assertRaisesRegex(InputError, 'no stage has ended'):
      r1_page.write(self.folder)
    self.stage('data', 'file', problems=9, heldout=1, conversations=3)
    text = r1_page.write(self.folder).read_text()
    self.assertIn('9 problems, 1 held out, 3 conversations', text)
    self.run_folder('3-reinforced')
    self.assertIn('Reinforcement', r1_page.write(self.folder).read_text())

  def test_rounds_have_a_table_and_a_picture(self):
    recipe = {'verify': True, 'bar': 0.8}
    (self.folder / 'recipe.json').write_text(json.dumps(recipe))
    interval = {'2': [0.8, 1.0], '3': [0.0, 0.2]}
    sample = {'prompt': '11+11=', 'text': '<i>22', 'right': True}
    for n, share in enumerate((0.05, 0.9)):
      counts = {'drawn': 80, 'right': 4, 'kept': 3, 'level': 3} if n else {}
      self.stage(
        f'round-{n:02}' if n else 'start', 'file',
        accuracy={'2': 0.95, '3': share}, interval=interval,
        samples=[sample], **counts,
      )  # fmt: skip
    text = evolve_page.write(self.folder).read_text()
    for words in ('keeps the right ones', '90.0 %', '&lt;i&gt;22', 'level 3'):
      self.assertIn(words, text)
    table = (self.folder / 'evolve.md').read_text().splitlines()
    self.assertEqual(
      table[0], '| round | level | drawn | right | kept | level 2 | level 3 |'
    )
    self.assertEqual(table[3], '| 01 | 3 | 80 | 4 | 3 | 95.0 % | 90.0 % |')


if __name__ == '__main__':
  absltest.main()
