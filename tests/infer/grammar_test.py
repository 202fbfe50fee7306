import json
import random
import re
import sys
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized

from deepseek_jax.data import tokenizer
from deepseek_jax.errors import InputError
from deepseek_jax.infer.grammar import MAX_SIZE, Grammar, Matchers
from tests import tokenizer_folders as folders
from tests.infer.formats import conversations as talks

try:
  import llguidance
except ImportError:
  llguidance = None

_MORE = 37  # tokens that the model has and the tokenizer lacks


def make(kind):
  if kind == 'bytes':
    return tokenizer.ByteTokenizer()
  if kind == 'marked':
    return talks.tokenizer()
  model = getattr(folders, kind)()
  return tokenizer.Tokenizer(model.to_str(), eos='</s>', pad='<pad>')


def allowed(matcher):
  """Returns the tokens that a matcher's mask allows."""
  mask = matcher.mask()
  assert mask.dtype == np.int32
  bits = np.unpackbits(mask.view(np.uint8), bitorder='little')
  return np.flatnonzero(bits)


def walk(matcher, rng, most=400, sharp=3.0):
  """Draws tokens by random logits under the mask; returns them."""
  out = []
  while len(out) < most:
    choices = allowed(matcher)
    assert len(choices), out
    logits = rng.normal(size=len(choices)) * sharp
    token = int(choices[np.argmax(logits + rng.gumbel(size=len(choices)))])
    assert matcher.accept(token), token
    out.append(token)
    if matcher.finished:
      break
  return out


def schema(rng, depth=0):
  """Returns a random JSON schema."""
  kinds = ['bool', 'int', 'text', 'enum', 'const', 'pattern', 'null', 'any_of']
  kinds += ['object', 'array', 'object'] * (depth < 3)
  kind = rng.choice(kinds) if depth else rng.choice(['object', 'array'])
  if kind == 'int':
    low = rng.randrange(-50, 50)
    return {'type': 'integer', 'minimum': low, 'maximum': low + 60}
  if kind == 'text':
    return {'type': 'string', 'maxLength': rng.randrange(4)}
  if kind == 'enum':
    return {'enum': rng.sample(['é', 'x"y', 7, None, '😀', [1], {'k': 2}], 3)}
  if kind == 'any_of':
    return {'anyOf': [schema(rng, depth + 1) for _ in range(2)]}
  if kind == 'array':
    least = rng.randrange(2)
    return {
      'type': 'array',
      'items': schema(rng, depth + 1),
      'minItems': least,
      'maxItems': least + rng.randrange(3),
    }
  if kind == 'object':
    names = rng.sample(['a', 'b', 'naïve', 'x y', 'q"'], rng.randrange(4))
    return {
      'type': 'object',
      'properties': {name: schema(rng, depth + 1) for name in names},
      'required': [name for name in names if rng.random() < 0.6],
      'additionalProperties': False,
    }
  return {
    'bool': {'type': 'boolean'},
    'null': {'type': 'null'},
    'const': {'const': 'ç\n'},
    'pattern': {'type': 'string', 'pattern': '^[a-c]{2}[0-9]?$'},
  }[kind]


def equal(a, b):
  return type(a) is type(b) and a == b


def fits(value, of):
  """Returns whether a value fits a schema of `schema`."""
  if 'anyOf' in of:
    return any(fits(value, each) for each in of['anyOf'])
  if 'enum' in of:
    return any(equal(value, each) for each in of['enum'])
  if 'const' in of:
    return equal(value, of['const'])
  kind = of['type']
  if kind == 'object':
    known, needed = of['properties'], of['required']
    return (
      isinstance(value, dict)
      and set(needed) <= value.keys() <= known.keys()
      and all(fits(v, known[k]) for k, v in value.items())
    )
  if kind == 'array':
    return (
      isinstance(value, list)
      and of['minItems'] <= len(value) <= of['maxItems']
      and all(fits(v, of['items']) for v in value)
    )
  if kind == 'integer':
    return type(value) is int and of['minimum'] <= value <= of['maximum']
  if kind == 'string':
    return (
      isinstance(value, str)
      and len(value) <= of.get('maxLength', 99)
      and bool(re.search(of.get('pattern', ''), value))
    )
  return {'boolean': bool, 'null': type(None)}[kind] is type(value)


class Case(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    if llguidance is None:
      self.skipTest('llguidance is not installed')


class SchemaTest(Case):
  @parameterized.parameters('bytes', 'byte_level', 'sentencepiece', 'marked')
  def test_what_is_drawn_fits_the_schema(self, kind):
    tok = make(kind)
    V = tok.vocab_size + _MORE
    matchers = Matchers(tok, vocab_size=V)
    rng, draws = random.Random(0), np.random.default_rng(0)
    count = {'bytes': 200, 'byte_level': 60}.get(kind, 25)
    done = 0
    for _ in range(count):
      wanted = schema(rng)
      matcher = matchers.matcher(Grammar.of_schema(wanted))
      ids = walk(matcher, draws)
      self.assertLess(max(ids, default=0), tok.vocab_size)
      if not matcher.finished:
        continue
      done += 1
      self.assertTrue(matcher.accepting)
      ids = [i for i in ids if i != tok.eos_id]
      text = tok.decode(ids)
      self.assertTrue(fits(json.loads(text), wanted), msg=f'{wanted} {text}')
      # No blanks but those inside of texts.
      compact = json.dumps(json.loads(text), ensure_ascii=False)
      self.assertLessEqual(len(text), 6 * len(compact))
    self.assertGreaterEqual(done, 0.95 * count)

  def test_a_cut_answer_is_not_accepting(self):
    matchers = Matchers(make('bytes'))
    wanted = {'type': 'object', 'properties': {'a': {'type': 'boolean'}}}
    wanted |= {'required': ['a'], 'additionalProperties': False}
    matcher = matchers.matcher(Grammar.of_schema(wanted))
    tok = make('bytes')
    for token in tok.encode('{"a":tru'):
      self.assertTrue(matcher.accept(token))
      self.assertFalse(matcher.accepting or matcher.finished)
      self.assertFalse(matcher.accept(tok.eos_id))
    self.assertEqual(matcher.validate(tok.encode('e}')), 2)
    self.assertEqual(matcher.validate([*tok.encode('e}'), tok.eos_id, 9]), 3)
    for token in tok.encode('e}'):
      self.assertTrue(matcher.accept(token))
    self.assertTrue(matcher.accepting and matcher.finished)
    self.assertEqual(allowed(matcher).tolist(), [tok.eos_id])

  def test_blanks_only_if_asked_for(self):
    tok = make('bytes')
    wanted = {'type': 'object', 'properties': {'a': {'type': 'null'}}}
    wanted['required'] = ['a']
    # A schema cannot ask for them on its own.
    sneaky = {**wanted, 'x-guidance': {'whitespace_flexible': True}}
    text = tok.encode('{ "a":')
    for each, whitespace, want in (
      (wanted, False, 1),
      (sneaky, False, 1),
      (wanted, True, len(text)),
    ):
      grammar = Grammar.of_schema(each, whitespace=whitespace)
      matcher = Matchers(tok).matcher(grammar)
      self.assertEqual(matcher.validate(text), want)

  def test_any_object(self):
    tok = make('bytes')
    matcher = Matchers(tok).matcher(Grammar('json'))
    text = tok.encode('{"é":[1,{"b":null}]}')
    self.assertEqual(matcher.validate(text), len(text))
    self.assertEqual(matcher.validate(tok.encode('[1]')), 0)


class MatcherTest(Case):
  @parameterized.parameters('bytes', 'byte_level', 'marked')
  def test_regex_and_lark(self, kind):
    tok = make(kind)
    matchers = Matchers(tok)
    for grammar in (
      Grammar('regex', '(ab|é)+c?'),
      Grammar('lark', 'start: ("ab" | "é")+ "c"?'),
    ):
      for text, fine in (
        ('ab', 1),
        ('éabc', 1),
        ('ac', 0),
        ('', 0),
        ('abcc', 0),
      ):
        matcher = matchers.matcher(grammar)
        ids = tok.encode(text)
        taken = [matcher.accept(token) for token in ids]
        self.assertEqual(all(taken) and matcher.accepting, bool(fine), msg=text)

  def test_an_end_may_come_where_the_text_may_end(self):
    tok = make('bytes')
    matcher = Matchers(tok, ends=(1, 3)).matcher(Grammar('regex', 'a+b?'))
    self.assertEqual(allowed(matcher).tolist(), tok.encode('a'))
    self.assertTrue(matcher.accept(tok.encode('a')[0]))
    self.assertEqual(allowed(matcher).tolist(), [1, 3, *tok.encode('ab')])
    self.assertFalse(matcher.finished)
    self.assertTrue(matcher.accept(3))
    self.assertTrue(matcher.finished and matcher.accepting)
    self.assertTrue(matcher.ended)
    self.assertEqual(allowed(matcher).tolist(), [1, 3])
    self.assertFalse(matcher.accept(1))
    self.assertEqual(matcher.validate([1]), 0)

  @parameterized.parameters('bytes', 'byte_level')
  def test_rollback_gives_the_masks_of_before(self, kind):
    tok = make(kind)
    rng, draws = random.Random(1), np.random.default_rng(1)
    for _ in range(20):
      grammar = Grammar.of_schema(schema(rng))
      matcher = Matchers(tok).matcher(grammar)
      masks, ids = [matcher.mask()], []
      for _ in range(60):
        choices = allowed(matcher)
        self.assertNotEmpty(choices)
        if matcher.ended:
          break
        ids.append(int(draws.choice(choices)))
        self.assertEqual(matcher.validate(ids[-1:]), 1)
        self.assertTrue(matcher.accept(ids[-1]))
        masks.append(matcher.mask())
      back = rng.randrange(len(ids) + 1)
      matcher.rollback(back)
      at = len(ids) - back
      np.testing.assert_array_equal(matcher.mask(), masks[at])
      self.assertEqual(matcher.validate(ids[at:]), back)
      for token, mask in zip(ids[at:], masks[at + 1 :]):
        self.assertTrue(matcher.accept(token))
        np.testing.assert_array_equal(matcher.mask(), mask)

  def test_a_token_that_is_refused_changes_nothing(self):
    tok = make('bytes')
    matcher = Matchers(tok, vocab_size=300).matcher(Grammar('regex', 'abc'))
    (a, b, c, d) = tok.encode('abcd')
    for token in (a, b):
      before = matcher.mask()
      for wrong in (d, tok.eos_id, tok.pad_id, 299, 300, -1, 10**9):
        self.assertFalse(matcher.accept(wrong), msg=wrong)
      np.testing.assert_array_equal(matcher.mask(), before)
      self.assertTrue(matcher.accept(token))
    self.assertEqual(matcher.validate([c, d]), 1)

  def test_taking_back_too_much_is_refused(self):
    tok = make('bytes')
    matcher = Matchers(tok).matcher(Grammar('regex', 'abc'))
    matcher.accept(tok.encode('a')[0])
    for count in (2, -1):
      with self.assertRaisesRegex(InputError, f'take back {count} of 1'):
        matcher.rollback(count)
    self.assertEqual(matcher.validate(tok.encode('bc')), 2)

  @parameterized.parameters('bytes', 'byte_level', 'sentencepiece', 'marked')
  def test_padding_and_marks_are_never_allowed(self, kind):
    tok = make(kind)
    for more in (0, 1, 31, 32, 33, 1000):
      V = tok.vocab_size + more
      matcher = Matchers(tok, vocab_size=V).matcher(Grammar('regex', '(.|\n)*'))
      self.assertLen(matcher.mask(), -(-V // 32))
      found = set(allowed(matcher).tolist())
      self.assertLess(max(found), tok.vocab_size)
      self.assertIn(tok.eos_id, found)
      marks = [
        i
        for i in range(tok.vocab_size)
        if re.fullmatch('<[^0].+>|｜DSML｜', tok.decode([i]))
      ]
      self.assertEqual(found & set(marks), {tok.eos_id})

  def test_a_grammar_keeps_what_its_matchers_need(self):
    tok = make('bytes')
    grammar = Grammar('regex', 'ab')
    one = grammar.matcher(tok, 300, (1,))
    two = Grammar('regex', 'ab').matcher(tok, 300, (1,))
    self.assertIs(one._known, two._known)
    self.assertEqual(one.validate([*tok.encode('ab'), 1]), 3)
    self.assertLen(one.mask(), 10)

  def test_matchers_of_one_grammar_go_their_own_way(self):
    tok = make('bytes')
    matchers = Matchers(tok)
    one, two = (matchers.matcher(Grammar('regex', 'ab|ac')) for _ in range(2))
    one.accept(tok.encode('a')[0])
    self.assertEqual(two.validate(tok.encode('ab')), 2)
    self.assertEqual(one.validate(tok.encode('c')), 1)


class InputTest(Case):
  @parameterized.parameters(
    ('schema', '{"type": "foo"}', 'Invalid type'),
    ('schema', '{"$ref": "http://x/y"}', 'not fetch'),
    ('schema', '{"type": "string", "pattern": "("}', 'unclosed group'),
    ('schema', '{"not": {}}', 'Unimplemented keys'),
    ('schema', '{"type":"integer","minimum":5,"maximum":3}', 'Unsatisfiable'),
    ('regex', 'a(', 'unclosed group'),
    ('regex', '(?<=x)y', 'look-around'),
    ('lark', 'start: foo', 'unknown name'),
    ('lark', '', ''),
  )
  def test_a_bad_grammar_is_one_line(self, kind, text, want):
    matchers = Matchers(make('bytes'))
    for call in (matchers.check, matchers.matcher):
      with self.assertRaisesRegex(InputError, f'^grammar: {kind}: ') as caught:
        call(Grammar(kind, text))
      said = str(caught.exception)
      self.assertIn(want, said)
      self.assertNotIn('\n', said)
      self.assertLess(len(said), 350)

  def test_false_allows_nothing_and_true_all(self):
    tok = make('bytes')
    matchers = Matchers(tok)
    with self.assertRaisesRegex(InputError, 'grammar: schema'):
      matchers.matcher(Grammar.of_schema(False))
    matcher = matchers.matcher(Grammar.of_schema(True))
    self.assertEqual(matcher.validate(tok.encode('[1,"a"]')), 7)

  def test_a_smaller_model_is_refused(self):
    with self.assertRaisesRegex(InputError, 'has 261 tokens, the model only 9'):
      Matchers(make('bytes'), vocab_size=9)

  def test_an_unknown_end_is_refused(self):
    for end in (261, -1):
      with self.assertRaisesRegex(InputError, f'end token {end} is outside'):
        Matchers(make('bytes'), ends=(1, end))


class GrammarTest(parameterized.TestCase):
  @parameterized.parameters(
    ('yaml', '', "grammar.kind = 'yaml': must be one of json, schema"),
    ('regex', 'a' * (MAX_SIZE + 1), 'at most 65536'),
    ('regex', None, 'grammar.text'),
    ('schema', '{', 'the schema is no JSON'),
    ('schema', '3', 'a schema is an object'),
    ('schema', '[' * 60000, 'the schema is nested too deeply'),
    (
      'schema',
      '{"a":' * 33 + '{}' + '}' * 33,
      'grammar.text: is deeper than 32',
    ),
  )
  def test_limits(self, kind, text, want):
    with self.assertRaisesRegex(InputError, re.escape(want)):
      Grammar(kind, text)

  def test_a_deep_object_is_refused_too(self):
    deep = {}
    for _ in range(5000):
      deep = {'a': deep}
    with self.assertRaisesRegex(InputError, '^grammar: the schema'):
      Grammar.of_schema(deep)
    with self.assertRaisesRegex(InputError, 'no JSON'):
      Grammar.of_schema({'a': {1, 2}})

  def test_equal_grammars_are_one_key(self):
    a, b = (Grammar.of_schema({'type': 'object'}) for _ in range(2))
    self.assertEqual(hash(a), hash(b))
    self.assertLen({a, b, Grammar('json'), Grammar('regex', 'x')}, 3)

  def test_response_format(self):
    of = Grammar.of_response_format
    self.assertIsNone(of(None))
    self.assertIsNone(of({'type': 'text'}))
    self.assertEqual(of({'type': 'json_object'}), Grammar('json'))
    form = {'type': 'json_schema', 'json_schema': {'schema': {'a': 1}}}
    self.assertEqual(of(form), Grammar.of_schema({'a': 1}))
    self.assertEqual(of({'type': 'regex', 'regex': 'a'}), Grammar('regex', 'a'))
    for bad in ('x', {'type': 'json_schema'}, {'type': 'regex'}, {'type': []}):
      with self.assertRaisesRegex(InputError, 'response_format.type'):
        of(bad)

  def test_a_missing_package_names_the_extra(self):
    with (
      mock.patch.dict(sys.modules, {'llguidance': None}),
      self.assertRaisesRegex(InputError, "the extra 'grammar': pip install"),
    ):
      Matchers(make('bytes'))


if __name__ == '__main__':
  absltest.main()
