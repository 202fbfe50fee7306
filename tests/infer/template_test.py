import datetime
import os
import signal
import subprocess
import sys
import threading
import time
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.errors import InputError
from deepseek_jax.infer import template


class EnvironmentTest(parameterized.TestCase):
  @parameterized.parameters(
    ('{{ x|tojson }}', '{"b": "é<&>", "a": [1, 2]}'),
    ('{{ x|tojson(separators=(",", ":")) }}', '{"b":"é<&>","a":[1,2]}'),
    ('{{ x|tojson(sort_keys=true) }}', '{"a": [1, 2], "b": "é<&>"}'),
    ('{{ x.a|tojson(indent=1) }}', '[\n 1,\n 2\n]'),
    ('{{ x.b|tojson(ensure_ascii=true) }}', '"\\u00e9<&>"'),
    ('{{ x.b|tojson(true) }}', '"\\u00e9<&>"'),
    ('{% generation %}\n{{ x.b }}{% endgeneration %}.', 'é<&>.'),
    ('{% set y = 1 %}{% generation %}{% set y = 2 %}'
     '{% endgeneration %}{{ y }}', '1'),
    ('{% for i in x.a %}{% generation %}{{ i }}{{ loop.index }}'
     '{% endgeneration %}{% endfor %}', '1122'),
    ('{% for i in x.a %}{% if i == 2 %}{% break %}{% endif %}{{ i }}'
     '{% endfor %}', '1'),
    ('  {% if true %}\n  a\n  {% endif %}\nb', '  a\nb'),
    ('{{ dict(a=1) }}{{ dict.fromkeys([1]) }}', "{'a': 1}{1: None}"),
    ('{% set n = namespace(self=1) %}{% set n.v = 2 %}{{ n.self + n.v }}', '3'),
    ('{{ nothing }}{{ nothing is defined }}', 'False'),
    ('{{ (1, 2) }}{{ t }}', '(1, 2)(1, 2)'),
  )  # fmt: skip
  def test_is_that_of_published_templates(self, text, want):
    x = {'b': 'é<&>', 'a': [1, 2]}
    self.assertEqual(template.render(text, {'x': x, 't': (1, 2)}), want)

  def test_now_is_now(self):
    said = template.render("{{ strftime_now('%Y') }}", {})
    self.assertIn(int(said) - datetime.datetime.now().year, (-1, 0))

  def test_a_template_sees_plain_values(self):
    class Text(str):
      pass

    values = [Text('a'), np.float32(0.5), np.bool_(False), np.zeros(2), {1: 2}]
    said = template.render(
      '{% for v in x %}{{ v }}|{% endfor %}', {'x': values}
    )
    self.assertEqual(said, 'a|0.5|False|<ndarray>|{1: 2}|')

  def test_odd_characters_come_back(self):
    text = 'a\x00\udc80\u2028é😀\r\n'
    self.assertEqual(template.render('{{ x }}', {'x': text}), text)


_LOOP = '{% for i in range(99999) %}' * 3 + '{% endfor %}' * 3


class LimitsTest(parameterized.TestCase):
  def check(self, text, words, **variables):
    with self.assertRaises(InputError) as caught:
      template.render(text, variables)
    said = str(caught.exception)
    self.assertRegex(said, f'^chat_template: .*{words}')
    self.assertNotIn('\n', said)
    self.assertTrue(said.isprintable())
    # The next template is as if nothing had been.
    self.assertEqual(template.render('{{ x }}', {'x': 1}), '1')

  @parameterized.parameters(
    ("{{ 'x' * 10 ** 9 }}", 'more than 256 MiB of memory'),
    ("{{ 'x' * 10 ** 12 }}", 'memory'),
    ("{% set x = ['a' * 1000000] %}{% for i in range(12) %}"
     '{% set ns = namespace(x=x * 4 ** loop.index) %}'
     "{{ ns.x|join('') }}{% endfor %}", 'memory'),
    ("{{ 'x' * 2 ** 25 }}", 'a text of 33554432 characters; at most 16777216'),
    ('{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}', 'RecursionError: .'),
    ('{{ ' + '(' * 50000, 'RecursionError: .'),
    ('a\n{% if %}', 'line 2: .*expression'),
    ("{{ raise_exception('') }}", 'TemplateError'),
    ("{{ raise_exception('no\n\x1b[31m') }}", 'no \ufffd'),
    ("{{ raise_exception(3) }}", '3'),
    ("{{ 'x' * 10 ** 5 ~ raise_exception('y' * 9999) }}", 'yyy'),
    ('{{ x.y.z }}', "'x' is undefined"),
    ('{% set n = namespace(__class__=1) %}', 'attribute'),
    ("{{ dict.__class__.__mro__ }}", 'unsafe'),
    ("{{ cycler.__init__.__globals__ }}", 'unsafe'),
  )  # fmt: skip
  def test_each_failure_has_words(self, text, words):
    self.check(text, words)

  @parameterized.parameters(_LOOP, '{{ 9 ** (9 ** 9) }}')
  def test_time_is_bounded(self, text):
    with mock.patch.object(template, 'SECONDS', 1):
      start = time.monotonic()
      self.check(text, 'more than 1 s')
    self.assertLess(time.monotonic() - start, 60)

  def test_messages_nested_too_deeply_are_named(self):
    deep = []
    for _ in range(5000):
      deep = [deep]
    with self.assertRaisesRegex(InputError, 'nested too deeply'):
      template.render('{{ x }}', {'x': deep})

  def test_a_worker_that_is_killed_is_replaced(self):
    self.assertEqual(template.render('a', {}), 'a')
    pid = template._worker.process.pid
    self.assertEqual(template.render('b', {}), 'b')
    self.assertEqual(template._worker.process.pid, pid)
    os.kill(pid, signal.SIGKILL)
    template._worker.process.wait()
    self.assertEqual(template.render('c', {}), 'c')
    self.assertNotEqual(template._worker.process.pid, pid)


class ProcessTest(absltest.TestCase):
  def test_threads_get_their_own_answers(self):
    said = {}

    def ask(n):
      said[n] = [template.render('{{ x }}', {'x': n}) for _ in range(20)]

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(6)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    self.assertEqual(said, {n: [str(n)] * 20 for n in range(6)})

  def test_a_fork_gets_a_worker_of_its_own(self):
    # In a process without JAX's threads, as a data loader's may be.
    code = (
      'import multiprocessing, os, sys\n'
      'from deepseek_jax.infer import template\n'
      'template.render("a", {})\n'
      'def child(q):\n'
      '  q.put(template.render("{{ x }}", {"x": 7}))\n'
      '  q.put(template._worker.process.pid)\n'
      'context = multiprocessing.get_context("fork")\n'
      'q = context.Queue()\n'
      'p = context.Process(target=child, args=(q,))\n'
      'p.start()\n'
      'said, other = q.get(timeout=60), q.get(timeout=60)\n'
      'p.join()\n'
      'print(said, template.render("b", {}),'
      ' other != template._worker.process.pid, p.exitcode)\n'
    )
    done = subprocess.run(
      [sys.executable, '-W', 'ignore::DeprecationWarning', '-c', code],
      capture_output=True,
      text=True,
      timeout=120,
    )
    self.assertEqual(done.stdout, '7 b True 0\n', msg=done.stderr)
    self.assertEqual(done.stderr, '')

  def test_the_worker_ends_with_its_parent(self):
    code = (
      'import os, signal\n'
      'from deepseek_jax.infer import template\n'
      'template.render("a", {})\n'
      'print(template._worker.process.pid, flush=True)\n'
      'os.kill(os.getpid(), signal.SIGKILL)\n'
    )
    done = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, timeout=120
    )
    pid = int(done.stdout)
    for _ in range(200):
      try:
        with open(f'/proc/{pid}/stat') as file:
          if file.read().rpartition(') ')[2][0] == 'Z':
            return
      except OSError:
        return
      time.sleep(0.05)
    self.fail('the worker outlives its parent')


if __name__ == '__main__':
  absltest.main()
