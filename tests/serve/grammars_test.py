"""Forms of answers, with and without thoughts before them."""

from absl.testing import absltest, parameterized

from deepseek_jax.errors import InputError
from deepseek_jax.infer.grammar import Matchers
from deepseek_jax.serve import grammars
from tests.serve import served as servers

_SCHEMA = {
  'type': 'object',
  'properties': {'a': {'type': 'integer'}},
  'required': ['a'],
  'additionalProperties': False,
}


class GrammarsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tokenizer = servers.deepseek_tokenizer()
    cls.matchers = Matchers(cls.tokenizer)
    (cls.end,) = cls.tokenizer.encode('</think>', special=True)
    cls.read = staticmethod(
      grammars.reader(cls.tokenizer, cls.tokenizer.vocab_size, ())
    )

  def fits(self, grammar, text):
    matcher = self.matchers.matcher(grammar)
    ids = self.tokenizer.encode(text, special=True)
    return all(map(matcher.accept, ids)) and matcher.accepting

  @parameterized.parameters(
    ('json_object', None, ('{}', '{"b":[1]}'), ('[]', '{', 'x', '')),
    ('json_schema', _SCHEMA, ('{"a":1}',), ('{}', '{"a":"1"}', '{"b":1}')),
    ('json_schema', True, ('7', '{}'), ('x',)),
    ('regex', 'a/b+', ('a/b', 'a/bb'), ('ab', 'a/')),
    ('regex', r'x\/y', ('x/y',), (r'x\/y',)),
    ('regex', r'(\d{3}|[/"]é)', ('123', '/é', '"é'), ('12', 'é')),
  )
  def test_an_answer_fits_at_once_or_behind_its_thoughts(
    self, kind, value, good, bad
  ):
    plain = self.read(kind, value)
    after = self.read(kind, value, self.end)
    for thought in ('', 'Hm, é {"a": "b"}\n\nso', '\n'):
      for gap in ('', '\n\n'):
        before = f'{thought}</think>{gap}'
        for text in good:
          self.assertTrue(self.fits(plain, text), text)
          self.assertTrue(self.fits(after, before + text), before + text)
          self.assertFalse(self.fits(after, text))
        for text in bad:
          self.assertFalse(self.fits(plain, text), text)
          self.assertFalse(self.fits(after, before + text), before + text)

  @parameterized.parameters(
    ('json_schema', {'type': 'nonsense'}),
    ('json_schema', {'$ref': '#/nowhere'}),
    ('json_schema', {'type': 'string', 'pattern': '('}),
    ('regex', '('),
  )
  def test_a_wrong_one_is_named_before_the_engine_meets_it(self, kind, value):
    for after in (None, self.end):
      with self.assertRaisesRegex(InputError, 'grammar') as caught:
        self.read(kind, value, after)
      self.assertLen(str(caught.exception).splitlines(), 1)

  def test_a_marks_name_in_a_regex_is_no_mark(self):
    found = self.read('regex', '</think>', self.end)
    self.assertFalse(self.fits(found, '</think></think>'))


if __name__ == '__main__':
  absltest.main()
