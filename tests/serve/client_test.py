"""Checks what OpenAI's own client gets from the server."""

import json

import httpx2 as httpx
import openai
from absl.testing import absltest, parameterized

from deepseek_jax.data.boundaries import Boundaries
from deepseek_jax.errors import InputError
from deepseek_jax.serve.config import Limits
from deepseek_jax.serve.served import Served
from tests import tokenizer_folders
from tests.serve import served as servers
from tests.serve.fake_engine import FakeEngine

_HI = [{'role': 'user', 'content': 'hi'}]
_WEATHER = {
  'type': 'function',
  'function': {
    'name': 'weather',
    'description': 'Tells the weather.',
    'parameters': {
      'type': 'object',
      'properties': {'city': {'type': 'string'}, 'days': {'type': 'integer'}},
    },
  },
}
_CALLS = (
  'Let me see.\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="weather">\n'
  '<｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>\n'
  '<｜DSML｜parameter name="days" string="false">3</｜DSML｜parameter>\n'
  '</｜DSML｜invoke>\n<｜DSML｜invoke name="weather">\n'
  '<｜DSML｜parameter name="city" string="true">Rome</｜DSML｜parameter>\n'
  '</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
)


def client_of(server, **fields):
  fields = {'api_key': servers.KEY, 'max_retries': 0, **fields}
  return openai.OpenAI(base_url=f'{server.url}/v1', **fields)


class ChatTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.tokenizer = servers.deepseek_tokenizer()
    cls.server, cls.engine = cls.enterClassContext(
      servers.running(servers.served_chat(cls.tokenizer, grammar=cls.grammar))
    )
    cls.client = cls.enterClassContext(client_of(cls.server))

  @staticmethod
  def grammar(kind, value, after):
    if value == {'type': 'nonsense'}:
      raise InputError('schema: type = nonsense')
    return kind, value, after

  def says(self, *texts):
    """Lets the engine say a text; of several, one for each answer."""
    ids = [self.tokenizer.encode(text, special=True) for text in texts]
    eos = self.tokenizer.eos_id
    self.engine.script = lambda request, index: [*ids[index % len(ids)], eos]

  def ask(self, **fields):
    fields = {'model': 'tiny-chat', 'messages': _HI, **fields}
    return self.client.chat.completions.create(**fields)

  def test_models_are_listed(self):
    (model,) = self.client.models.list()
    self.assertEqual(model.id, 'tiny-chat')
    self.assertTrue(model.capabilities['chat'])
    self.assertEqual(self.client.models.retrieve('tiny-chat').id, 'tiny-chat')
    with self.assertRaises(openai.NotFoundError) as caught:
      self.client.models.retrieve('gpt-5')
    self.assertEqual(caught.exception.code, 'model_not_found')

  def test_reasoning_is_apart_from_the_answer(self):
    self.says('Hm, é.\n</think>\n\nHello 東京!')
    answer = self.ask()
    message = answer.choices[0].message
    self.assertEqual(message.content, 'Hello 東京!')
    self.assertEqual(message.reasoning_content, 'Hm, é.')
    self.assertEqual(answer.choices[0].finish_reason, 'stop')
    usage = answer.usage
    told = self.engine.seen[-1]
    self.assertEqual(usage.prompt_tokens, len(told.prompt))
    self.assertEqual(
      usage.total_tokens, usage.prompt_tokens + usage.completion_tokens
    )
    self.assertGreater(usage.completion_tokens_details.reasoning_tokens, 3)
    self.assertEqual(usage.prompt_tokens_details.cached_tokens, 1)
    self.assertEqual(usage.prompt_cache_hit_tokens, 1)

  def test_a_stream_adds_up_to_the_whole_answer(self):
    self.says('Hm.</think>Hello 🎉 é!')
    whole = self.ask().choices[0].message
    content, reasoning, roles, ends, usages = '', '', [], [], []
    for chunk in self.ask(stream=True, stream_options={'include_usage': True}):
      usages.append(chunk.usage)
      for choice in chunk.choices:
        roles.append(choice.delta.role)
        content += choice.delta.content or ''
        reasoning += getattr(choice.delta, 'reasoning_content', None) or ''
        ends.append(choice.finish_reason)
    self.assertEqual(content, whole.content)
    self.assertEqual(reasoning, whole.reasoning_content)
    self.assertEqual([r for r in roles if r], ['assistant'])
    self.assertEqual([e for e in ends if e], ['stop'])
    self.assertEqual(ends[-1], 'stop')
    self.assertEqual([u for u in usages if u], [usages[-1]])
    self.assertGreater(usages[-1].completion_tokens, 5)

  def test_a_stream_without_the_wish_tells_no_usage(self):
    self.says('</think>x')
    url = f'{self.server.url}/v1/chat/completions'
    body = {'messages': _HI, 'stream': True}
    text = httpx.post(url, json=body).text
    self.assertNotIn('usage', text)
    self.assertEndsWith(text, 'data: [DONE]\n\n')

  def assertEndsWith(self, text, end):
    self.assertTrue(text.endswith(end), text[-200:])

  def test_an_answer_cut_while_it_thinks_has_no_content(self):
    self.says('so long a thought')
    answer = self.ask(max_completion_tokens=5)
    self.assertEqual(answer.choices[0].finish_reason, 'length')
    self.assertEqual(answer.choices[0].message.content, '')
    self.assertEqual(answer.usage.completion_tokens, 5)

  @parameterized.parameters(
    {'extra_body': {'thinking': {'type': 'disabled'}}},
    {'extra_body': {'chat_template_kwargs': {'thinking': False}}},
    {'extra_body': {'chat_template_kwargs': {'enable_thinking': False}}},
    {'reasoning_effort': 'none'},
  )
  def test_thinking_is_turned_off_by_any_of_its_names(self, **fields):
    self.says('Hello')
    answer = self.ask(**fields)
    self.assertEqual(answer.choices[0].message.content, 'Hello')
    end = self.tokenizer.encode('</think>', special=True)
    self.assertEqual(list(self.engine.seen[-1].prompt[-1:]), end)

  def test_names_that_contradict_each_other_are_refused(self):
    with self.assertRaisesRegex(openai.BadRequestError, 'says otherwise'):
      self.ask(
        reasoning_effort='none', extra_body={'thinking': {'type': 'enabled'}}
      )
    with self.assertRaisesRegex(openai.BadRequestError, 'says otherwise'):
      self.ask(max_tokens=3, max_completion_tokens=4)

  def test_several_answers_have_places_of_their_own(self):
    self.says('</think>one', '</think>two two', '</think>three')
    answer = self.ask(n=3, seed=5)
    texts = [choice.message.content for choice in answer.choices]
    self.assertEqual(texts, ['one', 'two two', 'three'])
    got = {}
    for chunk in self.ask(n=3, stream=True):
      for choice in chunk.choices:
        text = got.get(choice.index, '')
        got[choice.index] = text + (choice.delta.content or '')
    self.assertEqual(got, dict(enumerate(texts)))

  def test_seeds_decide_and_without_one_answers_differ(self):
    self.engine.script = None
    off = {'thinking': {'type': 'disabled'}}
    draw = lambda **f: self.ask(extra_body=off, **f).choices[0].message.content
    self.assertEqual(draw(seed=3), draw(seed=3))
    self.assertNotEqual(draw(seed=3), draw(seed=4))
    self.assertEqual(draw(seed=-1), draw(seed=-1))
    seeds = set()
    for _ in range(8):
      draw()
      seeds.add(self.engine.seen[-1].sampling.seed)
    self.assertLen(seeds, 8)

  def test_sampling_reaches_the_engine(self):
    self.says('</think>x')
    self.ask(
      temperature=0.5,
      top_p=0.9,
      presence_penalty=0.25,
      frequency_penalty=-0.5,
      logit_bias={'7': -100, '5': 1},
      extra_body={'top_k': 7, 'min_p': 0.1, 'repetition_penalty': 1.1},
    )
    sampling = self.engine.seen[-1].sampling
    self.assertEqual(sampling.temperature, 0.5)
    self.assertEqual(sampling.top_p, 0.9)
    self.assertEqual(sampling.presence_penalty, 0.25)
    self.assertEqual(sampling.frequency_penalty, -0.5)
    self.assertEqual(sampling.logit_bias, ((5, 1.0), (7, -100.0)))
    self.assertEqual(
      (sampling.top_k, sampling.min_p, sampling.repetition_penalty),
      (7, 0.1, 1.1),
    )
    self.assertEqual(sampling.stop, (self.tokenizer.eos_id,))

  @parameterized.parameters(True, False)
  def test_a_stop_text_ends_the_content_alone(self, stream):
    self.says('a STOP here.</think>Hello S T STOP and more')
    fields = {'stop': ['STOP', 'none'], 'stream': stream}
    if stream:
      chunks = [c.choices[0] for c in self.ask(**fields)]
      content = ''.join(c.delta.content or '' for c in chunks)
      finish = chunks[-1].finish_reason
    else:
      choice = self.ask(**fields).choices[0]
      content, finish = choice.message.content, choice.finish_reason
      self.assertIn('STOP', choice.message.reasoning_content)
    self.assertEqual((content, finish), ('Hello S T ', 'stop'))

  def test_log_probabilities_join_to_the_text(self):
    self.says('Hm</think>é 東!')
    answer = self.ask(logprobs=True, top_logprobs=2).choices[0]
    told = answer.logprobs.content
    data = bytes(b for token in told for b in token.bytes)
    self.assertEqual(data.decode(), answer.message.content)
    for token in told:
      self.assertLen(token.top_logprobs, 2)
      self.assertEqual(token.sampled_logprob, -0.25)
    thought = bytes(
      b for t in answer.logprobs.reasoning_content for b in t['bytes']
    )
    self.assertEqual(thought.decode(), 'Hm')
    streamed = []
    for chunk in self.ask(logprobs=True, top_logprobs=2, stream=True):
      for choice in chunk.choices:
        if choice.logprobs:
          streamed += choice.logprobs.content
    self.assertEqual(streamed, answer.logprobs.content)

  @parameterized.parameters(True, False)
  def test_calls_are_as_openai_writes_them(self, stream):
    self.says('Weather.</think>' + _CALLS)
    if stream:
      calls, finish, content = [], None, ''
      for chunk in self.ask(tools=[_WEATHER], stream=True):
        delta = chunk.choices[0].delta
        calls += delta.tool_calls or []
        content += delta.content or ''
        finish = chunk.choices[0].finish_reason
      self.assertEqual([call.index for call in calls], [0, 1])
    else:
      choice = self.ask(tools=[_WEATHER]).choices[0]
      calls, finish = choice.message.tool_calls, choice.finish_reason
      content = choice.message.content
      self.assertEqual(choice.message.reasoning_content, 'Weather.')
    self.assertEqual(content, 'Let me see.')
    self.assertEqual(finish, 'tool_calls')
    self.assertEqual([c.function.name for c in calls], ['weather'] * 2)
    given = [json.loads(c.function.arguments) for c in calls]
    self.assertEqual(given, [{'city': 'Paris', 'days': 3}, {'city': 'Rome'}])
    self.assertNotEqual(calls[0].id, calls[1].id)

  def test_one_call_alone_if_asked(self):
    self.says('</think>' + _CALLS)
    choice = self.ask(tools=[_WEATHER], parallel_tool_calls=False).choices[0]
    self.assertLen(choice.message.tool_calls, 1)
    self.assertEqual(choice.finish_reason, 'tool_calls')

  def test_a_conversation_with_calls_goes_on(self):
    self.says('Hm.</think>' + _CALLS)
    first = self.ask(tools=[_WEATHER]).choices[0].message
    results = [
      {'role': 'tool', 'tool_call_id': call.id, 'content': f'{n} degrees'}
      for n, call in enumerate(first.tool_calls)
    ]
    self.says('Hm.</think>Warm.')
    # As clients do: the message goes back as the library holds it.
    answer = self.ask(tools=[_WEATHER], messages=[*_HI, first, *results])
    self.assertEqual(answer.choices[0].message.content, 'Warm.')
    prompt = self.tokenizer.decode(self.engine.seen[-1].prompt)
    for words in ('Hm.', 'Paris', '0 degrees', '1 degrees'):
      self.assertIn(words, prompt)

  def test_a_call_can_be_required(self):
    call = '<｜DSML｜invoke name="weather">\n</｜DSML｜invoke>\n'
    self.says(f'{call}</｜DSML｜tool_calls>')
    other = {'type': 'function', 'function': {'name': 'other'}}
    named = {'type': 'function', 'function': {'name': 'weather'}}
    for choice in ('required', named):
      answer = self.ask(tools=[_WEATHER, other], tool_choice=choice)
      self.assertEqual(
        answer.choices[0].message.tool_calls[0].function.name, 'weather'
      )
      prompt = self.tokenizer.decode(self.engine.seen[-1].prompt)
      self.assertEqual('"other"' in prompt, choice == 'required')

  def test_no_text_of_a_user_becomes_a_special_token(self):
    self.says('</think>x')
    spelt = '<｜User｜></think><｜end▁of▁sentence｜>｜DSML｜<think>'
    count = lambda ids: sum(t in marks for t in ids)
    marks = set(self.tokenizer.encode(spelt, special=True))
    self.ask()
    plain = self.engine.seen[-1].prompt
    tools = [
      {'role': 'system', 'content': spelt},
      {'role': 'user', 'content': [{'type': 'text', 'text': spelt}]},
    ]
    self.ask(messages=tools)
    self.assertEqual(count(self.engine.seen[-1].prompt), count(plain))

  def test_forms_of_answers_reach_the_engine(self):
    self.says('</think>{}')
    schema = {'type': 'object'}
    (end,) = self.tokenizer.encode('</think>', special=True)
    for form, want in (
      ({'type': 'text'}, None),
      ({'type': 'json_object'}, ('json_object', None, end)),
      (
        {'type': 'json_schema', 'json_schema': {'name': 'a', 'schema': schema}},
        ('json_schema', schema, end),
      ),
      ({'type': 'regex', 'regex': 'a+'}, ('regex', 'a+', end)),
    ):
      self.ask(response_format=form)
      self.assertEqual(self.engine.seen[-1].grammar, want)
      off = {'thinking': {'type': 'disabled'}}
      self.ask(response_format=form, extra_body=off)
      want = want and (*want[:2], None)
      self.assertEqual(self.engine.seen[-1].grammar, want)
    with self.assertRaisesRegex(openai.BadRequestError, 'with tools'):
      self.ask(response_format=form, tools=[_WEATHER])
    with self.assertRaisesRegex(openai.BadRequestError, 'nonsense') as caught:
      wrong = {'name': 'a', 'schema': {'type': 'nonsense'}}
      self.ask(response_format={'type': 'json_schema', 'json_schema': wrong})
    self.assertEqual(caught.exception.param, 'response_format')

  def test_errors_are_the_clients_own(self):
    with self.assertRaises(openai.BadRequestError) as caught:
      self.ask(temperature=3)
    self.assertEqual(caught.exception.param, 'temperature')
    with self.assertRaises(openai.BadRequestError) as caught:
      self.ask(messages=[*_HI, {'role': 'root', 'content': 'x'}])
    self.assertEqual(caught.exception.param, 'messages[1].role')
    with self.assertRaises(openai.NotFoundError):
      self.ask(model='gpt-5')

  def test_an_error_amid_a_stream_is_raised(self):
    self.says('</think>' + 'x ' * 50)
    got, stream = 0, self.ask(stream=True)
    with self.assertRaises(openai.APIError) as caught:
      try:
        self.engine.pace = 0.01
        for _ in stream:
          got += 1
          self.engine.nan = self.engine.seen[-1].prompt[0]
      finally:
        self.engine.nan, self.engine.pace = None, 0.0
    self.assertGreater(got, 0)
    self.assertIn('NaN', caught.exception.message)
    self.assertEqual(caught.exception.body['code'], 'generation_failed')

  def test_the_experts_load_comes_with_the_last_chunk_if_asked(self):
    self.says('</think>x')
    want = {'layers': 2, 'experts': 3, 'counts': [[0, 1, 2], [3, 4, 5]]}
    more = {'expert_load': True}
    self.assertEqual(self.ask(extra_body=more).expert_load, want)
    *_, last = self.ask(extra_body=more, stream=True)
    self.assertEqual((last.choices, last.expert_load), ([], want))
    self.assertFalse(hasattr(self.ask(), 'expert_load'))

  def test_a_prefix_is_gone_on_with(self):
    self.says(' and more')
    answer = self.ask(
      messages=[*_HI, {'role': 'assistant', 'content': 'Yes', 'prefix': True}],
      extra_body={'thinking': {'type': 'disabled'}},
    )
    self.assertEqual(answer.choices[0].message.content, ' and more')
    prompt = self.tokenizer.decode(self.engine.seen[-1].prompt)
    self.assertTrue(prompt.endswith('Yes'), prompt[-40:])

  def test_conversations_are_cut_into_tokens(self):
    answer = httpx.post(
      f'{self.server.url}/tokenize', json={'messages': _HI}
    ).json()
    self.says('</think>x')
    self.ask()
    self.assertEqual(tuple(answer['tokens']), self.engine.seen[-1].prompt)
    self.assertEqual(answer['max_model_len'], 4096)


class CompletionsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.server, cls.engine = cls.enterClassContext(
      servers.running(servers.served_bytes(), limits=Limits(answers=4))
    )
    cls.client = cls.enterClassContext(client_of(cls.server))

  def ask(self, prompt='abc', **fields):
    fields = {'model': 'tiny', 'temperature': 0, **fields}
    return self.client.completions.create(prompt=prompt, **fields)

  @parameterized.parameters(
    ('abc', ['abc']),
    (['abc', 'de'], ['abc', 'de']),
    ([102, 103], ['ab']),
    ([[102, 103], [104]], ['ab', 'c']),
    ('', ['<|eos|>']),
  )
  def test_prompts_of_every_shape(self, prompt, want):
    answer = self.ask(prompt)
    texts = [choice.text for choice in answer.choices]
    if prompt == '':
      self.assertEqual(self.engine.seen[-1].prompt, (servers.BYTES.eos_id,))
    else:
      self.assertEqual(texts, want)
    echoed = [choice.text for choice in self.ask(prompt, echo=True).choices]
    if prompt != '':
      self.assertEqual(echoed, [text * 2 for text in want])

  def test_places_of_several_answers_to_several_prompts(self):
    answer = self.ask(['ab', 'xyz'], n=2, temperature=1, seed=3, max_tokens=4)
    self.assertEqual([c.index for c in answer.choices], [0, 1, 2, 3])
    for choice in answer.choices:
      self.assertLessEqual(
        set(choice.text), set('ab' if choice.index < 2 else 'xyz')
      )
    seeds = [r.sampling.seed for r in self.engine.seen[-2:]]
    self.assertEqual(seeds, [3, 5])
    got = {}
    for chunk in self.ask(
      ['ab', 'xyz'], n=2, temperature=1, seed=3, max_tokens=4, stream=True
    ):
      for choice in chunk.choices:
        got[choice.index] = got.get(choice.index, '') + choice.text
    self.assertEqual(got, {c.index: c.text for c in answer.choices})

  def test_length_and_stop_texts(self):
    cut = self.ask('abcdef', max_tokens=3).choices[0]
    self.assertEqual((cut.text, cut.finish_reason), ('abc', 'length'))
    stopped = self.ask('abcdef', stop='cd').choices[0]
    self.assertEqual((stopped.text, stopped.finish_reason), ('ab', 'stop'))
    whole = self.ask('abcdef').choices[0]
    self.assertEqual((whole.text, whole.finish_reason), ('abcdef', 'stop'))

  def test_an_answer_ends_with_the_context(self):
    answer = self.ask('a' * 250, max_tokens=100).choices[0]
    self.assertEqual((len(answer.text), answer.finish_reason), (6, 'length'))

  def test_a_hole_is_filled_by_the_models_marks(self):
    self.ask('def f(', suffix='return x')
    encode = servers.BYTES.encode
    self.assertEqual(
      list(self.engine.seen[-1].prompt),
      [2, *encode('def f('), 3, *encode('return x'), 4],
    )

  def test_echo_tells_of_every_token_as_the_harness_reads_it(self):
    # lm-evaluation-harness: context and continuation as ids, one token more.
    context, rest = servers.BYTES.encode('abé'), servers.BYTES.encode('xy')
    answer = self.ask([*context, *rest], max_tokens=1, logprobs=1, echo=True)
    told = answer.choices[0].logprobs
    for values in (told.tokens, told.token_logprobs, told.top_logprobs):
      self.assertLen(values, len(context) + len(rest) + 1)
    self.assertIsNone(told.token_logprobs[0])
    self.assertIsNone(told.top_logprobs[0])
    scored = told.token_logprobs[len(context) : -1]
    self.assertEqual(scored, [-0.5 - token / 1000 for token in rest])
    self.assertEqual(
      told.tokens[:5], ['a', 'b', 'bytes:\\xc3', 'bytes:\\xa9', 'x']
    )
    for token, value, top in zip(
      told.tokens[1:], told.token_logprobs[1:], told.top_logprobs[1:]
    ):
      self.assertEqual(top[token], value)
    text = answer.choices[0].text
    self.assertEqual(text, 'abéxya')
    self.assertEqual(told.text_offset, [0, 1, 2, 2, 3, 4, 5])

  def test_nothing_new_if_only_the_prompt_is_asked_about(self):
    answer = self.ask('abc', max_tokens=0, logprobs=1, echo=True)
    self.assertEqual(answer.choices[0].text, 'abc')
    self.assertLen(answer.choices[0].logprobs.tokens, 3)
    self.assertEqual(answer.usage.completion_tokens, 0)
    self.assertEqual(answer.usage.total_tokens, 3)

  def test_what_is_impossible_is_a_number_that_json_has(self):
    answer = self.ask([102, 7, 103], max_tokens=0, logprobs=0, echo=True)
    self.assertEqual(answer.choices[0].logprobs.token_logprobs[1], -9999.0)

  def test_a_stream_adds_up(self):
    fields = {'logprobs': 1, 'echo': True}
    whole = self.ask('abé', **fields).choices[0]
    text, tokens, offsets = '', [], []
    for chunk in self.ask('abé', stream=True, **fields):
      text += chunk.choices[0].text
      tokens += chunk.choices[0].logprobs.tokens
      offsets += chunk.choices[0].logprobs.text_offset
    self.assertEqual(text, whole.text)
    self.assertEqual(tokens, whole.logprobs.tokens)
    self.assertEqual(offsets, whole.logprobs.text_offset)

  def test_tokens_and_back(self):
    post = lambda path, **body: httpx.post(
      self.server.url + path, json=body
    ).json()
    text = 'naïve 東京 <|eos|>'
    tokens = post('/tokenize', prompt=text)['tokens']
    self.assertNotIn(servers.BYTES.eos_id, tokens)
    self.assertEqual(post('/detokenize', tokens=tokens)['prompt'], text)

  def test_harnesses_learn_the_special_tokens(self):
    url = self.server.url
    told = httpx.get(url + '/tokenizer_info').json()
    self.assertEqual(told['eos_token'], '<|eos|>')
    self.assertIsNone(told['bos_token'])
    body = {'prompt': told['eos_token'], 'add_special_tokens': False}
    tokens = httpx.post(url + '/tokenize', json=body).json()['tokens']
    self.assertEqual(tokens, [servers.BYTES.eos_id])

  def test_text_never_becomes_a_special_token(self):
    self.ask('<|eos|><|fim_hole|>')
    self.assertGreater(min(self.engine.seen[-1].prompt), 4)

  def test_busy_is_tried_again_as_the_header_says(self):
    self.engine.queue = 0
    with client_of(self.server, max_retries=1) as client:
      seen = len(self.engine.seen)
      with self.assertRaises(openai.RateLimitError):
        client.completions.create(model='tiny', prompt='a', timeout=20)
    self.engine.queue = 64
    self.assertLen(self.engine.seen, seen)


class BeginningTest(absltest.TestCase):
  def test_prompts_begin_as_the_tokenizer_says(self):
    tokenizer = servers.of_folder(
      tokenizer_folders.byte_level(tokenizer_folders.BOS)
    )
    served = Served(
      name='bos',
      tokenizer=tokenizer,
      boundaries=Boundaries((0,), (), (1,)),
      context=64,
      vocab_size=tokenizer.vocab_size,
    )
    engine = FakeEngine(tokenizer, context=64, stop=1)
    with servers.running(served, engine) as (server, _):
      with client_of(server) as client:
        answer = client.completions.create(
          model='bos', prompt='hello', logprobs=0, echo=True, max_tokens=1
        )
      self.assertEqual(engine.seen[-1].prompt[0], 0)
      told = answer.choices[0].logprobs
      self.assertEqual(told.tokens[0], '<s>')
      self.assertEqual(told.text_offset[:2], [0, 0])
      self.assertTrue(answer.choices[0].text.startswith('hello'))


if __name__ == '__main__':
  absltest.main()
