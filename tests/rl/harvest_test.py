"""Right answers become conversations: kept, counted, resumed after a kill."""

import itertools
import json
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.data import conversations
from deepseek_jax.data.tokenizer import ByteTokenizer
from deepseek_jax.record.partial_lines import PartialLines
from deepseek_jax.rl import answering, chats, harvest
from deepseek_jax.rl.grading import rewards
from tests.rl import taught


class HarvestTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, self.folder)

  def harvest(self, name='a.jsonl', **changes):
    keep = changes.pop('keep', 'all')
    path = os.path.join(self.folder, name)
    task = changes.pop('task', None) or taught.read()
    cfg = taught.sampled(**changes)
    return path, harvest.harvest(taught.asked(), task, path, cfg, keep=keep)

  def test_right_answers_are_kept_and_the_rest_is_counted(self):
    warm = {'temperature': 2.0}  # else all of them are right
    path, found = self.harvest(**warm)
    task, said = taught.read(), list(conversations.read(path))
    self.assertEqual(found.problems, len(task.train))
    self.assertEqual(found.answers, 3 * len(task.train))
    self.assertLen(said, found.kept)
    self.assertGreater(found.kept, 0)
    self.assertLess(found.kept, found.answers)
    asked = {p['prompt'] for p in task.train}
    pairs = [tuple(m['content'] for m in c.messages) for c in said]
    self.assertLessEqual({prompt for prompt, _ in pairs}, asked)
    self.assertLen(set(pairs), len(pairs))  # what was said twice is one
    for prompt, answer in pairs:
      self.assertTrue(answer.isdigit(), prompt)
    self.assertEqual(found.solved, len({prompt for prompt, _ in pairs}))
    # Independently: the engine's answers, sorted by hand.
    with answering.Answering(
      taught.asked(), task, task.train, taught.sampled(**warm)
    ) as answers:
      groups = dict(answers.each())
    want = [
      (task.train[place]['prompt'], text)
      for place, group in groups.items()
      for text in dict.fromkeys(
        a.text for a in group if a.whole and a.text.isdigit()
      )
    ]
    self.assertEqual(pairs, want)
    self.assertEqual(
      found.unfinished, sum(not a.whole for g in groups.values() for a in g)
    )
    # A student learns just what was sampled, the end with it.
    store = taught.config(path)
    chat = store.chat.build(ByteTokenizer())
    turn = chat.turns(said[0].messages)[0]
    self.assertEqual(turn.answer[-1], ByteTokenizer.eos_id)

  def test_an_answer_without_an_end_is_counted_and_not_kept(self):
    encode, end = ByteTokenizer().encode, ByteTokenizer.eos_id
    scored = [
      answering.Scored((*encode('12'), end), '12', True, 1.0, True),
      answering.Scored(tuple(encode('3456')), '3456', False, 1.0, True),
    ]
    row = harvest._kept(taught.asked(), '5+7=', scored, 'all')
    said = [message['content'] for [_, message] in row['messages']]
    self.assertEqual(said, ['12'])
    counts = harvest.Harvest(*row['counts'])
    self.assertEqual((counts.right, counts.kept, counts.unfinished), (2, 1, 1))

  def test_one_of_a_problem_may_be_kept(self):
    _, all_of_them = self.harvest()
    shortest, one = self.harvest('b.jsonl', keep='shortest')
    self.assertEqual(one.kept, one.solved)
    self.assertEqual(one.solved, all_of_them.solved)
    lengths = {}
    for c in conversations.read(os.path.join(self.folder, 'a.jsonl')):
      prompt, answer = (m['content'] for m in c.messages)
      lengths.setdefault(prompt, []).append(len(answer))
    for c in conversations.read(shortest):
      prompt, answer = (m['content'] for m in c.messages)
      self.assertLen(answer, min(lengths[prompt]))

  def test_a_killed_one_goes_on_to_the_same_file(self):
    path, _ = self.harvest()
    other = os.path.join(self.folder, 'b.jsonl')
    whole = answering.Answering.each
    asked = []

    def killed(self, first=0, end=None):
      for place, group in whole(self, first, end):
        if place == 4:
          raise KeyboardInterrupt
        yield place, group

    def counted(self, first=0, end=None):
      asked.append(first)
      return whole(self, first, end)

    with (
      mock.patch.object(answering.Answering, 'each', killed),
      self.assertRaises(KeyboardInterrupt),
    ):
      self.harvest('b.jsonl')
    self.assertFalse(os.path.exists(other))
    partial = Path(self.folder, 'b.partial')
    partial.write_bytes(partial.read_bytes() + b'{"cut of')  # by the kill
    with mock.patch.object(answering.Answering, 'each', counted):
      self.harvest('b.jsonl')
      self.harvest('b.jsonl')  # nothing is sampled again
    self.assertEqual(asked, [4])
    self.assertEqual(Path(other).read_text(), Path(path).read_text())
    self.assertFalse(partial.exists())

  def test_another_call_overwrites_nothing(self):
    path, _ = self.harvest()
    before = Path(path).read_text()
    with self.assertRaisesRegex(ds.InputError, 'another call .seed is 0'):
      self.harvest(seed=1)
    self.assertEqual(Path(path).read_text(), before)
    Path(self.folder, 'own.jsonl').write_text('{"prompt": "a"}\n')
    with self.assertRaisesRegex(ds.InputError, 'was not written by this'):
      self.harvest('own.jsonl')
    with self.assertRaisesRegex(ds.InputError, 'must end in .jsonl'):
      self.harvest('a.txt')

  def test_neighbouring_seeds_draw_far_apart(self):
    cfgs = [taught.sampled(n=100, seed=seed) for seed in range(50)]
    firsts = sorted(answering.first_seed(cfg, 0) for cfg in cfgs)
    gaps = [b - a for a, b in itertools.pairwise(firsts)]
    self.assertGreater(min(gaps), 10**9)
    places = [answering.first_seed(cfgs[0], place) for place in range(3)]
    self.assertEqual(np.diff(places).tolist(), [100, 100])

  def test_a_file_of_an_earlier_version_is_used_again(self):
    path, found = self.harvest()
    head, *rest = Path(path).read_text().splitlines(keepends=True)
    old = json.loads(head)
    for name in ('seeds', 'verifiers'):
      del old['made']['settings'][name]
    Path(path).write_text(''.join([json.dumps(old) + '\n', *rest]))
    self.assertEqual(self.harvest()[1], found)

  def test_a_file_that_was_cut_is_not_used(self):
    path, found = self.harvest()
    text = Path(path).read_text()
    self.assertEqual(self.harvest()[1], found)
    lines = text.splitlines(keepends=True)
    for cut in (''.join(lines[:-1]), text[:-3], text + lines[-1]):
      Path(path).write_text(cut)
      with self.assertRaisesRegex(
        ds.InputError, f'of the {found.kept} convers'
      ):
        self.harvest()
      self.assertEqual(Path(path).read_text(), cut)

  def test_no_right_answer_is_said(self):
    own = os.path.join(self.folder, 'own.py')
    task = taught.task(self.folder, rewards=[{'kind': 'own', 'file': own}])
    Path(own).write_text('def score(text, problem): return 0.5\n')
    task = taught.tasks.read(task)
    with self.assertRaisesRegex(ds.InputError, 'none is kept .*0 of .* are ri'):
      self.harvest(task=task, n=1, temperature=0.0)
    self.assertFalse(os.path.exists(os.path.join(self.folder, 'a.jsonl')))

  def test_a_failing_verifier_is_no_wrong_answer(self):
    own = os.path.join(self.folder, 'own.py')
    path = taught.task(self.folder, rewards=[{'kind': 'own', 'file': own}])
    Path(own).write_text(
      'def score(text, problem):\n'
      '  if problem["prompt"].startswith("1"): raise ValueError("no")\n'
      '  return float(text.isdigit())\n'
    )
    task = taught.tasks.read(path)
    failing = sum(p['prompt'].startswith('1') for p in task.train)
    _, found = self.harvest(task=task)
    self.assertGreater(failing, 0)
    self.assertEqual(found.errors, 3 * failing)


class SpokenTest(absltest.TestCase):
  def test_only_what_is_learnt_as_it_was_sampled(self):
    made = ByteTokenizer()
    chat = chats.PlainChat(made)
    encode, end = made.encode, made.eos_id
    said = chats.spoken(chat, made, 'ab', [*encode('cd'), end])
    self.assertEqual([m['content'] for m in said], ['ab', 'cd'])
    # Learnt with an end that it did not have.
    self.assertIsNone(chats.spoken(chat, made, 'ab', encode('cd')))
    template = chats.TemplateChat(
      {
        'chat_template': '{% for m in messages %}{{ m.content | striptags }}'
        '{% if m.role == "assistant" %}<|eos|>{% endif %}{% endfor %}'
      },
      made,
    )
    ask = lambda text: chats.spoken(template, made, 'a', [*encode(text), end])
    self.assertEqual([m['content'] for m in ask(' c ')], ['a', ' c '])
    self.assertIsNone(ask('<b>c'))  # the template would take this away

  def test_reasoning_is_told_from_the_answer(self):
    from deepseek_jax.infer import formats
    from tests.infer.formats import conversations as talks

    made = talks.tokenizer()
    chat = chats.FormatChat(formats.get('r1'), made)
    prompt = chat.prompt('q')
    answer = made.encode('why</think>so<｜end▁of▁sentence｜>', special=True)
    said = chats.spoken(chat, made, 'q', answer)
    self.assertEqual(said[1]['content'], 'so')
    self.assertEqual(said[1]['reasoning_content'], 'why')
    turn = chat.turns(said)[0]
    self.assertEqual(turn.prompt, prompt)
    # Spaces around the mark are those of the form.
    self.assertEqual(made.decode(turn.answer).split()[0], 'why')
    self.assertEqual(turn.answer[-1], answer[-1])
    # Reasoning that never ends is no answer.
    endless = made.encode('why<｜end▁of▁sentence｜>', special=True)
    self.assertIsNone(chats.spoken(chat, made, 'q', endless))


class RightTest(parameterized.TestCase):
  @parameterized.parameters(
    (('exact', 'format'), (1.0, 0.0), True),
    (('exact', 'format'), (0.5, 1.0), False),
    (('format', 'length'), (1.0, -0.5), False),
    (('format',), (1.0,), True),
    (('own', 'exact'), (1.0, 0.0), False),
  )
  def test_verifiers_of_the_answer_itself_decide(self, kinds, scores, want):
    made = [rewards.Reward(kind, None) for kind in kinds]
    self.assertEqual(rewards.is_right(made, scores), want)

  def test_weights_are_full_marks(self):
    made = [rewards.Reward('exact', None, 0.1), rewards.Reward('own', None, -1)]
    self.assertTrue(rewards.is_right(made, [0.1, 0.0]))
    self.assertFalse(rewards.is_right(made, [0.0, 0.0]))
    none = [rewards.Reward('exact', None, 0.0)]
    self.assertFalse(rewards.is_right(none, [0.0]))


class PartialLinesTest(absltest.TestCase):
  def path(self):
    folder = tempfile.mkdtemp()
    self.addCleanup(shutil.rmtree, folder)
    return Path(folder, 'deep', 'a.jsonl')

  def test_lines_stay_and_a_cut_one_goes(self):
    path = self.path()
    with PartialLines(path, {'a': 1}) as lines:
      lines.add({'n': 1})
      lines.add({'n': 2})
    for cut in (b'{"n": 3', b'', b'{"n": 3}'):
      whole = path.read_bytes()
      path.write_bytes(whole + cut)
      with PartialLines(path, {'a': 1}) as lines:
        self.assertEqual(lines.rows, [{'n': 1}, {'n': 2}])
      self.assertEqual(path.read_bytes(), whole)
    with PartialLines(path, {'a': 1}) as lines:
      lines.add({'n': 3})
    self.assertEqual(json.loads(path.read_text().splitlines()[-1]), {'n': 3})

  def test_other_settings_and_damage_are_named(self):
    path = self.path()
    PartialLines(path, {'a': 1, 'b': 2}).close()
    with self.assertRaisesRegex(ds.InputError, 'b is 2 there, 3 here'):
      PartialLines(path, {'a': 1, 'b': 3})
    with self.assertRaisesRegex(ds.InputError, 'b is 2 there, missing here'):
      PartialLines(path, {'a': 1})
    path.write_bytes(path.read_bytes() + b'nonsense\n')
    with self.assertRaisesRegex(ds.InputError, 'line 2: is damaged'):
      PartialLines(path, {'a': 1, 'b': 2})


if __name__ == '__main__':
  absltest.main()
