"""Answers as they come: reasoning, content and calls, by token ids."""

import json
import random

from absl.testing import absltest, parameterized

from deepseek_jax.data import tokenizer as text_tokenizers
from deepseek_jax.infer import formats
from deepseek_jax.infer.formats import pieces
from tests.infer.formats import conversations as talks

try:
  import deepseek_recipe as recipe
except ImportError:
  recipe = None

_D, _EOS = pieces.DSML, pieces.EOS
_TALK = [talks.user('u')]
_DSML = ('v32', 'v4', 'v41')


def block(name, *calls):
  """Returns a block of calls as a model of a format writes it."""
  calls = [formats.ToolCall(n, json.dumps(a)) for n, a in calls]
  markup = formats.get(name).markup
  write = markup.write_all if name in ('v3', 'r1') else markup.write
  return formats.text_of(write(tuple(calls))).lstrip('\n')


_TWO = (('w', {'a': 'x\n"y"é', 'b': {'k': [1, 2]}}), ('z', {}))


def parsed(name, text, *, thinking=False, prompt=None, each=None, **options):
  """Parses a text whose marks are special; `each` sees every delta."""
  tok, chat = talks.tokenizer(), formats.get(name)
  if prompt is None:
    prompt = formats.encode(tok, chat.render(_TALK, thinking=thinking))
  parser = chat.parser(tok, prompt, **options)
  for token in tok.encode(text, special=True):
    delta = parser.feed(token)
    if each:
      each(delta)
  delta = parser.finish()
  if each:
    each(delta)
  return parser


def result(name, text, **options):
  """Returns (reasoning, content, [(name, arguments)])."""
  got = parsed(name, text, **options).parsed
  calls = [(c.name, c.arguments) for c in got.tool_calls]
  return got.reasoning_content, got.content, calls


def texts(name):
  """Yields answers in a format, well-formed."""
  two = block(name, *_TWO)
  yield from (
    'r</think>a',
    '\n\nr\n\n</think>\n\na\n',
    'r',
    '',
    '</think>a',
    'r</think>',
    'a',
    '\n\na',
    'r</think>a</think>b',
    'r\n</think>a\n\nb\n\n',
    f'r</think>\n\n{two}',
    f'r</think>a\n\n{two}',
    f'r\n\n{two}',
    two,
    f'a\n\n{two}\n',
    'r</think>x<y\n\n<z\n',
    'é👩‍👧漢</think>é👩‍👧漢',
    'r</think>a\n\n\nb<',
    'r' + '\n' * 300 + '</think>' + '\n' * 300 + 'a' + '\n' * 300 + 'b',
    block(name, ('n', {'t': 'x>\n' * 300, 'u': '\n' * 300 + 'x' * 300})),
    f'r</think>{block(name, ("n", {"t": " <b> "}))}',
  )


class RecipeTest(parameterized.TestCase):
  """Equals DeepSeek's own parser."""

  def theirs(self, text, thinking, tools):
    body = {'model': 'DeepSeek-V4-Pro', 'messages': _TALK}
    body |= {} if thinking else {'thinking': {'type': 'disabled'}}
    request = recipe.ChatCompletionRequest(body)
    request = request.convert(recipe.ConversionOptions())
    start = recipe.ThinkingInitialStage.ReasoningStart if thinking else None
    generator = recipe.ChatCompletionRequest.chunk_generator(request, 'i', 'm')
    processor = recipe.StreamProcessor(
      generator,
      recipe.ParsingOptions(
        parse_tool_calls=tools, thinking_initial_stage=start
      ),
      recipe.Tokenizer.from_str(talks.marked_tokenizer()),
    )
    chunk, end = recipe.InferenceChunk, recipe.InferenceFinishReason.Stop
    ids = talks.tokenizer().encode(text, special=True)
    given = [chunk.ready(), *(chunk.tokens([i]) for i in ids)]
    chunks = [c for g in [*given, chunk.finish(end)] for c in processor.push(g)]
    whole = recipe.ChatCompletionResponse('i', 'm', 0, 0, 0)
    for each in [*chunks, *processor.finish()]:
      whole.accumulate(each)
    found = json.loads(whole.to_json())['choices'][0]['message']
    calls = [c['function'] for c in found.get('tool_calls') or []]
    return (
      found.get('reasoning_content') or '',
      found.get('content') or '',
      [(c['name'], c['arguments']) for c in calls],
    )

  @parameterized.product(
    name=('v4', 'v41'), thinking=(True, False), tools=(True, False)
  )
  def test_answers_are_read_as_deepseek_reads_them(self, name, thinking, tools):
    if recipe is None:
      self.skipTest('deepseek-recipe is not installed')
    for text in texts(name):
      got = result(name, text, thinking=thinking, tools=tools)
      self.assertEqual(got, self.theirs(text, thinking, tools), msg=text)


class ParseTest(parameterized.TestCase):
  @parameterized.parameters(*formats.FORMATS)
  def test_deltas_add_up_and_the_end_of_turn_ends(self, name):
    for text in texts(name):
      for thinking in (True, False):
        deltas = []
        parser = parsed(
          name, f'{text}{_EOS}never', thinking=thinking, each=deltas.append
        )
        got = parser.parsed
        self.assertEqual(''.join(d.content for d in deltas), got.content)
        self.assertEqual(
          ''.join(d.reasoning for d in deltas), got.reasoning_content
        )
        calls = tuple(call for d in deltas for call in d.tool_calls)
        self.assertEqual(calls, got.tool_calls)
        self.assertTrue(got.finished)
        self.assertEqual(parser.state, 'ended')
        self.assertNotIn('never', got.content)
        # The end of the turn gives what the end of the tokens gives.
        cut = result(name, text, thinking=thinking)
        both = [(c.name, c.arguments) for c in got.tool_calls]
        self.assertEqual((got.reasoning_content, got.content, both), cut)

  @parameterized.parameters(*formats.FORMATS)
  def test_calls_are_read(self, name):
    want = [('w', '{"a": "x\\n\\"y\\"é", "b": {"k": [1, 2]}}'), ('z', '{}')]
    text = f'Let me.\n\n{block(name, *_TWO)}'
    _, content, calls = result(name, text)
    self.assertEqual(content, 'Let me.')
    self.assertEqual([(n, json.loads(a)) for n, a in calls], list(_TWO))
    if name in _DSML:
      self.assertEqual(calls, want)
    got = parsed(name, text).parsed.tool_calls
    self.assertEqual([call.id for call in got], ['call_0', 'call_1'])

  def test_other_tokens_may_end_a_turn(self):
    tok, chat = talks.tokenizer(), formats.get('v4')
    for name in (pieces.USER, pieces.SYSTEM):  # one of the format, one not
      (end,) = tok.encode(name, special=True)
      ids = [*tok.encode('ab'), end, *tok.encode('c')]
      got = chat.parser(tok).parse(ids)
      self.assertEqual(got, (f'ab{name}c', '', (), False))
      got = chat.parser(tok, ends=[end, tok.vocab_size + 3]).parse(ids)
      self.assertEqual(got, ('ab', '', (), True))

  @parameterized.parameters(*formats.FORMATS)
  def test_an_answer_is_the_next_prompts_message(self, name):
    chat = formats.get(name)
    for text in texts(name):
      got = parsed(name, f'{text}{_EOS}', thinking=True).parsed
      said = got.message()
      self.assertEqual(said['content'], got.content)
      whole = chat.render([*_TALK, said], generation=False, thinking=True)
      calls = chat.read([*_TALK, said]).messages[-1].tool_calls
      self.assertEqual(calls, got.tool_calls)
      self.assertIn(got.content, formats.text_of(whole))

  def test_reasoning_that_does_not_end_leaves_no_content(self):
    for name in formats.FORMATS:
      self.assertEqual(result(name, 'r', thinking=True), ('r', '', []))

  def test_text_that_spells_a_mark_is_text(self):
    tok, chat = talks.tokenizer(), formats.get('v4')
    prompt = formats.encode(tok, chat.render(_TALK, thinking=True))
    got = chat.parser(tok, prompt).parse(tok.encode(f'a</think>{_EOS}b'))
    self.assertEqual(got, ('', f'a</think>{_EOS}b', (), False))
    text = block('v4', *_TWO)
    got = chat.parser(tok, prompt[:-1]).parse(tok.encode(text))
    self.assertEqual(got, (text, '', (), False))

  def test_a_thought_may_open_by_itself(self):
    self.assertEqual(result('v3', '<think>\nr\n</think>\n\na'), ('r', 'a', []))
    self.assertEqual(result('v3', 'a<think>b'), ('', 'a<think>b', []))

  def test_tokens_of_reasoning_are_counted_with_its_end(self):
    self.assertEqual(parsed('v4', 'abc</think>de').reasoning_tokens, 0)
    parser = parsed('v4', 'abc</think>de', thinking=True)
    self.assertEqual(parser.reasoning_tokens, 4)

  def test_content_comes_with_its_token(self):
    deltas = []
    parsed('v4', 'a b<c', each=deltas.append)
    texts = [d.content for d in deltas]
    self.assertEqual(texts, ['a', ' ', 'b', '', '<c', ''])

  def test_without_tools_markup_is_content(self):
    for name in formats.FORMATS:
      text = block(name, *_TWO)
      self.assertEqual(result(name, text, tools=False), ('', text, []))


class PromptTest(parameterized.TestCase):
  def after(self, name, messages, text, **options):
    tok = talks.tokenizer()
    prompt = formats.get(name).render(messages, **options)
    return result(name, text, prompt=formats.encode(tok, prompt))

  def test_a_prefix_goes_on_where_it_is(self):
    u, a = talks.user('u'), talks.assistant
    for name in formats.FORMATS:
      on = {'thinking': True}
      got = self.after(name, [u, a('', 'r', prefix=True)], '\ns</think>t', **on)
      self.assertEqual(got, ('\ns', 't', []))
      got = self.after(name, [u, a('x', 'r', prefix=True)], '\ny', **on)
      self.assertEqual(got, ('', '\ny', []))
      got = self.after(name, [u, a('x\n\n', prefix=True)], 'y')
      self.assertEqual(got, ('', 'y', []))

  def test_a_block_that_the_prompt_opened(self):
    for name in _DSML:
      options = {
        'tools': [talks.TOOL],
        'tool_choice': 'required',
        'thinking': False,
      }
      opening = formats.text_of(formats.get(name).markup.opening())
      text = block(name, *_TWO).removeprefix(opening.lstrip('\n'))
      _, content, calls = self.after(name, _TALK, text, **options)
      self.assertEqual(content, '')
      self.assertEqual([(n, json.loads(a)) for n, a in calls], list(_TWO))

  def test_after_a_result(self):
    messages, options = talks.TALKS['called_no_tools']
    for name in formats.FORMATS:
      prompt = {'v3': 'a', 'r1': 'a'}.get(name, 'r</think>a')
      got = self.after(name, messages, prompt, **options)
      self.assertEqual(got[1:], ('a', []))

  def test_marks_in_the_words_about_tools_do_not_count(self):
    got = self.after('v32', _TALK, 'a', tools=[talks.TOOL])
    self.assertEqual(got, ('', 'a', []))


class MalformedTest(parameterized.TestCase):
  """Markup that is none is content, and nothing of it is lost."""

  @parameterized.parameters(*_DSML)
  def test_dsml(self, name):
    good = block(name, *_TWO)
    for text in (
      good.replace('invoke name=', 'invoke nam='),
      good.replace('string="true"', 'string="maybe"'),
      good.replace('string="true"', 'string="true" x'),
      good.replace('parameter name="b"', 'parameter name="a"'),
      good.replace(f'</{_D}', f'<{_D}'),
      f'<{_D}unknown>',
      f'<{_D}',
      f'{_D} alone',
      good.split('\n')[0],
      f'{good.split(chr(10))[0]}\nhello',
      good[: good.index('invoke>')],
      f'{good.split(chr(10))[0]}\n{good.split(chr(10))[-1]}',
    ):
      for end in ('', _EOS):
        got = result(name, f'a {text}{end}')
        self.assertEqual(got, ('', f'a {text}', []), msg=text)

  @parameterized.parameters(*_DSML)
  def test_what_follows_good_calls_is_kept(self, name):
    good = block(name, *_TWO)
    _, content, calls = result(name, f'{good}more')
    self.assertEqual((content, len(calls)), ('more', 2))
    cut = good[: good.rindex('</')]
    _, content, calls = result(name, f'{cut}junk')
    self.assertEqual((content.strip(), len(calls)), ('junk', 2))
    half = good[: good.index('name="z"')]
    _, content, calls = result(name, half)
    self.assertLen(calls, 1)
    self.assertEqual(content.strip(), half[half.rindex('<') :].strip())

  @parameterized.parameters('v3', 'r1')
  def test_fenced(self, name):
    good = block(name, *_TWO)
    for text in (
      good.replace('```json', '```'),
      good.replace('<｜tool▁sep｜>', ''),
      good.replace('<｜tool▁call▁end｜>', ''),
      good.replace('<｜tool▁call▁begin｜>', ''),
      '<｜tool▁calls▁begin｜>',
      '<｜tool▁calls▁begin｜><｜tool▁calls▁end｜>',
      '<｜tool▁calls▁begin｜>hello',
      '<｜tool▁call▁begin｜>function<｜tool▁sep｜>w',
      '<｜tool▁sep｜>',
    ):
      for end in ('', _EOS):
        got = result(name, f'a {text}{end}')
        self.assertEqual(got, ('', f'a {text}', []), msg=text)

  @parameterized.parameters(*formats.FORMATS)
  def test_random_tokens_lose_nothing_but_newlines_and_marks(self, name):
    tok, rng = talks.tokenizer(), random.Random(0)
    chat = formats.get(name)
    words = [tok.encode(n, special=True) for n in chat.marks if n != _EOS]
    words += [tok.encode(t) for t in ('<', '\n', 'invoke name="', 'é', '>')]
    words += [tok.encode(block(name, *_TWO), special=True)]
    for _ in range(300):
      ids = [i for w in rng.choices(words, k=rng.randrange(12)) for i in w]
      got = chat.parser(tok, tools=False).parse(ids)
      text = tok.decode(ids).replace('\n', '')
      for mark in ('<think>', '</think>'):
        text = text.replace(mark, '')
      found = got.reasoning_content + got.content
      found = found.replace('\n', '').replace('<think>', '')
      self.assertEqual(found.replace('</think>', ''), text)
      chat.parser(tok).parse(ids)  # never fails


class StopTest(parameterized.TestCase):
  def test_a_stop_text_ends_the_content(self):
    for text in ('abXYZcd', 'abXYZ', f'abXYZ{_EOS}'):
      parser = parsed('v4', text, stop=['XYZ'])
      self.assertEqual(parser.parsed, ('ab', '', (), False))
      self.assertTrue(parser.stopped)
    parser = parsed('v4', 'XYaXYb', stop=['XYZ'])
    self.assertEqual(parser.parsed.content, 'XYaXYb')
    self.assertFalse(parser.stopped)

  def test_never_inside_reasoning_or_calls(self):
    got = result('v4', 'aXYZb</think>cXYZd', thinking=True, stop=['XYZ'])
    self.assertEqual(got, ('aXYZb', 'c', []))
    got = result('v4', 'XY</think>Zd', thinking=True, stop=['XYZ'])
    self.assertEqual(got, ('XY', 'Zd', []))
    text = block('v4', ('w', {'a': 'XYZ'}))
    got = result('v4', text, stop=['XYZ'])
    self.assertEqual(got, ('', '', [('w', '{"a": "XYZ"}')]))

  def test_what_may_begin_a_stop_text_comes_before_the_calls(self):
    deltas = []
    parsed('v4', f'aX{block("v4", *_TWO)}', stop=['XY'], each=deltas.append)
    order = [('c' if d.content else 't') for d in deltas if any(d)]
    self.assertEqual(order, ['c', 'c', 't'])
    self.assertEqual(''.join(d.content for d in deltas), 'aX')


class SpelledTest(parameterized.TestCase):
  """Models whose tokenizer lacks the marks write them as text."""

  @parameterized.parameters(*formats.FORMATS)
  def test_marks_are_read_from_the_text(self, name):
    tok, chat = text_tokenizers.ByteTokenizer(), formats.get(name)
    for text in texts(name):
      for thinking in (True, False):
        talk = chat.render(_TALK, thinking=thinking)
        prompt = formats.encode(tok, talk, spell=True)
        got = chat.parser(tok, prompt, spell=True).parse(tok.encode(text))
        calls = [(c.name, c.arguments) for c in got.tool_calls]
        self.assertEqual(
          (got.reasoning_content, got.content, calls),
          result(name, text, thinking=thinking),
          msg=text,
        )


if __name__ == '__main__':
  absltest.main()
