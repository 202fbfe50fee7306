"""A tiny model behind the server: what a client gets is the engine's own."""

import concurrent.futures
import functools
import json

import httpx2 as httpx
import jax
import numpy as np
import openai
import pytest
from absl.testing import absltest

import deepseek_jax as ds
from deepseek_jax.data.boundaries import Boundaries
from deepseek_jax.infer.engine import Engine, EngineConfig
from deepseek_jax.serve import grammars
from deepseek_jax.serve.served import Served, fingerprint
from tests import tiny
from tests.serve import served as servers

_BYTES = servers.BYTES
_CONTEXT, _VOCAB = 64, 272


class EngineTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    config = ds.changed(tiny.config('step'), {'vocab_size': _VOCAB})
    cls.model = ds.build(config)
    cls.variables = tiny.draw(cls.model)
    cfg = EngineConfig(
      slots=4,
      context=_CONTEXT,
      page=8,
      budget=32,
      steps=3,
      rows=(4,),
      contexts=(_CONTEXT,),
      routing=True,
    )
    ends = (_BYTES.eos_id,)
    cls.engine = Engine(cls.model, cls.variables, cfg, text=_BYTES)
    served = Served(
      name='tiny',
      tokenizer=_BYTES,
      boundaries=Boundaries((), (), ends),
      context=_CONTEXT,
      vocab_size=_VOCAB,
      grammar=grammars.reader(_BYTES, _VOCAB, ends),
      fingerprint=fingerprint(cls.variables),
    )
    cls.server, _ = cls.enterClassContext(
      servers.running(served, cls.engine, seconds=600)
    )
    cls.client = cls.enterClassContext(
      openai.OpenAI(
        base_url=f'{cls.server.url}/v1', api_key='none', max_retries=0
      )
    )

  def ask(self, prompt='def f(x):', **fields):
    fields = {'model': 'tiny', 'temperature': 0, 'max_tokens': 12, **fields}
    return self.client.completions.create(prompt=prompt, **fields)

  def check_all_pages_are_free(self):
    stats = self.engine.stats
    self.assertEqual(stats['pages_free'], stats['pages'])

  def test_scores_of_a_prompt_are_the_trainers_forward(self):
    prompt = _BYTES.encode('def f(x): é')
    told = self.ask(prompt, echo=True, logprobs=2, max_tokens=1)
    told = told.choices[0].logprobs
    out = self.model.apply(self.variables, np.array([prompt], np.int32))
    want = np.asarray(jax.nn.log_softmax(out.logits[0]))
    at = np.arange(len(prompt) - 1)
    np.testing.assert_allclose(
      told.token_logprobs[1:-1], want[at, prompt[1:]], atol=1e-5
    )
    likeliest = [max(top.values()) for top in told.top_logprobs[1:]]
    np.testing.assert_allclose(likeliest, want.max(axis=-1), atol=1e-5)

  def test_answers_are_the_same_alone_and_in_a_crowd(self):
    prompts = [f'x{i} = {"y" * (i % 7)}' for i in range(12)]
    draw = lambda i, **f: (
      self.ask(prompts[i], temperature=1, seed=i, **f).choices[0].text
    )
    alone = [draw(i) for i in range(12)]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
      crowd = list(pool.map(draw, range(12)))
    self.assertEqual(crowd, alone)
    streamed = ''.join(
      chunk.choices[0].text
      for chunk in self.ask(prompts[3], temperature=1, seed=3, stream=True)
    )
    self.assertEqual(streamed, alone[3])
    both = self.ask(prompts[:2], temperature=1, seed=0).choices
    self.assertEqual([c.text for c in both], alone[:2])
    self.assertEqual(
      self.engine.stats['pages_free'], self.engine.stats['pages']
    )

  def test_prefixes_are_reused_within_a_salt_alone(self):
    prompt = 'a long beginning that fills some pages '
    cached = lambda salt: (
      self.ask(
        prompt, extra_body={'cache_salt': salt}
      ).usage.prompt_tokens_details.cached_tokens
    )
    self.assertEqual(cached('one'), 0)
    self.assertGreater(cached('one'), 7)
    self.assertEqual(cached('two'), 0)

  def test_answers_have_the_form_that_is_asked_for(self):
    schema = {
      'type': 'object',
      'properties': {'a': {'enum': [1, 2]}, 'b': {'type': 'boolean'}},
      'required': ['a', 'b'],
      'additionalProperties': False,
    }
    form = {
      'type': 'json_schema',
      'json_schema': {'name': 'x', 'schema': schema},
    }
    for seed in range(3):
      choice = self.ask(
        temperature=1,
        seed=seed,
        max_tokens=40,
        extra_body={'response_format': form},
      ).choices[0]
      found = json.loads(choice.text)
      self.assertEqual(set(found), {'a', 'b'})
      self.assertEqual(choice.finish_reason, 'stop')
    with self.assertRaisesRegex(openai.BadRequestError, 'response_format'):
      wrong = {'type': 'regex', 'regex': '('}
      self.ask(extra_body={'response_format': wrong})

  def test_experts_are_counted_for_each_token_of_the_answer(self):
    answer = self.ask(n=2, extra_body={'expert_load': True}, max_tokens=9)
    load = answer.expert_load
    moe = self.model.config.moe
    self.assertEqual(load['experts'], moe.experts)
    new = answer.usage.completion_tokens
    for row in load['counts']:
      self.assertEqual(sum(row), new * moe.top_k)

  def test_streams_that_are_cut_give_their_pages_back(self):
    url = f'{self.server.url}/v1/completions'
    body = {'prompt': 'abc', 'max_tokens': 50, 'stream': True}
    with httpx.Client() as client:
      for _ in range(8):
        with client.stream('POST', url, json=body) as response:
          next(response.iter_lines())
    self.ask(max_tokens=1)
    self.assertEqual(
      self.engine.stats['pages_free'], self.engine.stats['pages']
    )

  def test_what_the_engine_refuses_is_a_400(self):
    with self.assertRaises(openai.BadRequestError):
      self.ask('x' * _CONTEXT)
    with self.assertRaisesRegex(openai.BadRequestError, 'token 272'):
      self.ask([5, 272])

  def test_fingerprints_tell_weights_apart(self):
    same = jax.tree.map(lambda a: a + 0, self.variables)
    self.assertEqual(fingerprint(same), fingerprint(self.variables))
    other = jax.tree.map(lambda a: a * 1.01, self.variables)
    self.assertNotEqual(fingerprint(other), fingerprint(self.variables))
    self.assertEqual(
      self.ask(max_tokens=1).system_fingerprint, fingerprint(self.variables)
    )


@pytest.mark.slow
class ChatTest(absltest.TestCase):
  """A conversation in V4's format with a real, tiny model."""

  def test_thinking_a_schema_a_stop_text_and_a_stream(self):
    tokenizer = servers.deepseek_tokenizer()
    config = ds.changed(
      tiny.config('gqa'), {'vocab_size': tokenizer.vocab_size}
    )
    model = ds.build(config)
    variables = tiny.draw(model)
    ends = (tokenizer.eos_id,)
    cfg = EngineConfig(
      slots=4, context=768, page=16, budget=64, steps=3, contexts=(768,)
    )
    engine = Engine(model, variables, cfg, text=tokenizer)
    vocab = tokenizer.vocab_size
    served = servers.served_chat(
      tokenizer,
      context=768,
      grammar=grammars.reader(tokenizer, vocab, ends),
      fingerprint=fingerprint(variables),
    )
    server, _ = self.enterContext(servers.running(served, engine, seconds=600))
    client = self.enterContext(
      openai.OpenAI(base_url=f'{server.url}/v1', api_key='none', max_retries=0)
    )
    ask = functools.partial(
      client.chat.completions.create,
      model='tiny-chat',
      messages=[{'role': 'user', 'content': 'hello'}],
      seed=3,
      max_tokens=40,
    )
    schema = {
      'type': 'object',
      'properties': {'a': {'enum': [1, 2]}},
      'required': ['a'],
      'additionalProperties': False,
    }
    form = {
      'type': 'json_schema',
      'json_schema': {'name': 'x', 'schema': schema},
    }
    off = {'thinking': {'type': 'disabled'}}
    said = ask(response_format=form, extra_body=off).choices[0].message
    self.assertIn(json.loads(said.content), ({'a': 1}, {'a': 2}))
    # A random model never ends its reasoning: all it says is part of that.
    on = {'thinking': {'type': 'enabled'}}
    whole = ask(extra_body=on)
    self.assertTrue(whole.choices[0].message.reasoning_content)
    self.assertEqual(whole.choices[0].finish_reason, 'length')
    # The pieces of a stream are the whole answer, of each of two.
    plain = ask(n=2, extra_body=off)
    texts = {0: '', 1: ''}
    for chunk in ask(n=2, extra_body=off, stream=True):
      for choice in chunk.choices:
        texts[choice.index] += choice.delta.content or ''
    want = {c.index: c.message.content for c in plain.choices}
    self.assertEqual(texts, want)
    # A text that stands within the answer ends it.
    text = want[0]
    stop = text[len(text) // 2 :][:2]
    cut = ask(n=2, stop=[stop], extra_body=off).choices[0]
    self.assertEqual(cut.message.content, text[: text.index(stop)])
    self.assertEqual(cut.finish_reason, 'stop')
    stats = engine.stats
    self.assertEqual(stats['pages_free'], stats['pages'])


if __name__ == '__main__':
  absltest.main()
