"""The engine: whatever else runs, an answer is the training model's own."""

import dataclasses
import functools
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from deepseek_jax.data.tokenizer import ByteTokenizer
from deepseek_jax.errors import InputError
from deepseek_jax.infer.engine import Engine, EngineBusy, EngineConfig
from deepseek_jax.infer.paging import paging
from deepseek_jax.infer.prepared import build_flat
from deepseek_jax.infer.request import Request, Sampling
from deepseek_jax.model.attention import dsa
from deepseek_jax.plan import memory
from tests import fake_devices, tiny
from tests.infer import families

CONTEXT = 64
GREEDY = Sampling(temperature=0)
SMALL = EngineConfig(
  slots=3, context=CONTEXT, page=8, budget=16, steps=3, contexts=(CONTEXT,)
)


class SmallBytes(ByteTokenizer):
  """Fits the tiny models, whose vocabulary is smaller than bytes."""

  vocab_size = tiny.VOCAB


def engine(name='gqa', variables=None, text=None, **change):
  """Returns an engine of a family; programs are shared between calls."""
  cfg = dataclasses.replace(SMALL, **change)
  variables = variables or families.variables(name)
  return Engine(families.model(name), variables, cfg, text=text)


def prompts(count, seed=0, most=30):
  rng = np.random.default_rng(seed)
  sizes = rng.integers(1, most, count)
  return [tuple(map(int, rng.integers(1, tiny.VOCAB, n))) for n in sizes]


def requests(count, seed=0, new=12, most=30, **fields):
  fields = {'sampling': GREEDY, 'logprobs': 0, **fields}
  return [
    Request(p, max_new_tokens=new, **fields) for p in prompts(count, seed, most)
  ]


def mixed():
  """Returns 300 requests of all lengths and settings."""
  rng = np.random.default_rng(0)
  asked = []
  for i in range(300):
    settings = Sampling(
      temperature=float(rng.choice([0, 1, 0.3])),
      top_k=int(rng.choice([0, 5])),
      top_p=float(rng.choice([1, 0.5])),
      frequency_penalty=float(rng.choice([0, 0.4])),
      logit_bias=((3, 1.0),) if i % 7 == 0 else (),
      seed=i,
      stop=(2,) if i % 3 == 0 else (),
    )
    size = int(rng.integers(1, 50))
    prompt = tuple(map(int, rng.integers(1, tiny.VOCAB, size)))
    new = int(rng.integers(1, 14))
    wanted = int(rng.choice([0, 3])) if i % 2 else None
    asked.append(
      Request(prompt, new, settings, logprobs=wanted, echo=i % 11 == 0)
    )
  return asked


@functools.cache
def forward(name):
  return jax.jit(families.model(name).apply)


def trained(name, tokens):
  """Log-probabilities [T V] of the trainer's forward."""
  padded = np.zeros((1, CONTEXT), np.int32)
  padded[0, : len(tokens)] = tokens
  segments = (np.arange(CONTEXT) < len(tokens)).astype(np.int32)[None]
  out = forward(name)(families.variables(name), padded, segment_ids=segments)
  return np.asarray(jax.nn.log_softmax(out.logits[0]))[: len(tokens)]


def check_trained(test, name, request, answer, tolerance=1e-5):
  """Checks an answer's log-probabilities against the trainer's."""
  want = trained(name, request.prompt + answer.tokens)
  at = np.arange(len(answer.tokens)) + len(request.prompt) - 1
  got = [p.logprob for p in answer.logprobs]
  np.testing.assert_allclose(
    got, want[at, list(answer.tokens)], rtol=0, atol=tolerance
  )
  if request.sampling.temperature == 0:
    gaps = want[at].max(axis=-1) - want[at, list(answer.tokens)]
    test.assertLess(gaps.max(), 1e-5)


class FamilyTest(parameterized.TestCase):
  @parameterized.parameters(*families.NAMES)
  def test_log_probabilities_are_those_of_the_trainers_forward(self, name):
    # Five prompts on three slots: chunks, waiting and mixed lengths.
    asked = requests(5, new=14)
    run = engine(name)
    answers = run.run(asked)
    for request, (answer,) in zip(asked, answers):
      self.assertEqual(answer.finish, 'length')
      check_trained(self, name, request, answer)
    self.assertEqual(run.stats['pages_free'], run.stats['pages'])

  @parameterized.parameters('gqa', 'nsa', 'v4')
  def test_a_shared_prefix_changes_no_token(self, name):
    self.check_prefix(name)

  @parameterized.parameters('mla', 'v3', 'dsa', 'in_blocks', 'engram')
  @pytest.mark.slow
  def test_a_shared_prefix_of_other_families_does_neither(self, name):
    self.check_prefix(name)

  def check_prefix(self, name):
    first = prompts(1, seed=3, most=40)[0] + tuple(range(1, 30))
    again = (*first[:27], 5, 6, 7)
    run = engine(name)
    [[one]] = run.run([Request(first, 20, GREEDY, logprobs=0)])
    [[two]] = run.run([Request(again, 20, GREEDY, logprobs=0)])
    self.assertGreaterEqual(two.usage.cached_tokens, 8)
    # The next turn of a chat goes on from the last one's answer.
    turn = (*again, *two.tokens, 9, 8)
    [[three]] = run.run([Request(turn, 8, GREEDY, logprobs=0)])
    self.assertGreaterEqual(three.usage.cached_tokens, 40)
    cold = engine(name, reuse=False)
    for prompt, got, new in (
      (first, one, 20),
      (again, two, 20),
      (turn, three, 8),
    ):
      [[want]] = cold.run([Request(prompt, new, GREEDY, logprobs=0)])
      families.check_same(got, want)

  @parameterized.parameters(*families.NAMES)
  def test_a_token_takes_the_bytes_that_the_planner_says(self, name):
    model = families.model(name)
    lies = paging(build_flat(model), 8)
    length = 1 << 15
    grown = memory.cache(model.config, 2 * length).elements
    grown -= memory.cache(model.config, length).elements
    self.assertEqual(lies.token_bytes * length, 4 * grown)

  def test_entries_of_6_tokens_lie_in_pages(self):
    asked = requests(3, new=14)
    for request, [got] in zip(asked, engine('v4_of_6').run(asked)):
      check_trained(self, 'v4_of_6', request, got)

  def test_entries_of_17_tokens_have_no_pages(self):
    compress = {'attention.hca.ratio': 17}
    model = build_flat(ds.build(ds.changed(families.config('v4'), compress)))
    with self.assertRaisesRegex(InputError, 'a row of R tokens, where R .*13'):
      paging(model, 8)


class ContractTest(parameterized.TestCase):
  @parameterized.parameters('v3', 'v4')
  def test_an_answer_is_the_same_alone_and_in_any_batch(self, name):
    # One bucket for everything: bitwise.
    asked = requests(6, seed=1, sampling=Sampling(seed=7), new=10)
    together = engine(name, deterministic=True).run(asked)
    for request, (got,) in zip(asked[::2], together[::2]):
      [[alone]] = engine(name, deterministic=True).run([request])
      self.assertEqual(got.tokens, alone.tokens)
      self.assertEqual(got.logprobs, alone.logprobs)

  @parameterized.parameters(1, 40)
  def test_chunks_of_a_prompt_are_one_prefill(self, budget):
    self.check_chunks(budget)

  @parameterized.parameters(3, 8)
  @pytest.mark.slow
  def test_chunks_of_other_sizes_are_too(self, budget):
    self.check_chunks(budget)

  @parameterized.product(name=('v3', 'v4'), budget=(63, 64, 65))
  @pytest.mark.slow
  def test_so_are_chunks_of_a_long_prompt(self, name, budget):
    prompt = tuple(map(int, tiny.tokens(1, 150, seed=6)[0]))
    request = Request(prompt, 6, Sampling(seed=1), logprobs=1, echo=True)
    fields = {'context': 192, 'contexts': (192,)}
    [[answer]] = engine(name, budget=budget, **fields).run([request])
    [[whole]] = engine(name, budget=192, **fields).run([request])
    families.check_same(answer, whole)

  def check_chunks(self, budget):
    name = 'v4'
    [request] = requests(1, seed=5, new=6, most=31)
    run = engine(name, budget=budget)
    [[answer]] = run.run([request])
    check_trained(self, name, request, answer)

  @pytest.mark.slow
  def test_index_sets_are_those_of_the_trainers_forward(self):
    one = {'layout': ((('dense',), 1),)}
    made = ds.build(ds.changed(families.config('dsa'), one))
    variables, seen, choose = tiny.draw(made), {}, dsa.choose

    def note(places, chosen):
      for place, some in zip(np.ravel(places), chosen.reshape(-1, 6)):
        if (some >= 0).any():
          seen[int(place)] = set(some[some >= 0].tolist())

    def noted(cfg, query, keys, visibility, *more, **how):
      chosen = choose(cfg, query, keys, visibility, *more, **how)
      jax.debug.callback(note, visibility.places, chosen)
      return chosen

    (request,) = requests(1, seed=3, new=30, most=31)
    with mock.patch.object(dsa, 'choose', noted):
      run = Engine(made, variables, dataclasses.replace(SMALL, slots=1))
      ((answer,),) = run.run([request])
      jax.effects_barrier()
      engines = dict(seen)
      seen.clear()
      tokens = [*request.prompt, *answer.tokens[:-1]]
      made.apply(variables, np.array([tokens], np.int32))
      jax.effects_barrier()
    self.assertLen(seen, len(tokens))
    differ = [place for place in seen if engines[place] != seen[place]]
    print(f'{len(differ)} of {len(seen)} index sets differ')
    self.assertEmpty(differ)

  @parameterized.parameters('mla', 'v4')
  def test_a_preempted_answer_is_the_undisturbed_one(self, name):
    asked = requests(3, seed=2, new=24, most=20, sampling=Sampling(seed=1))
    rich, poor = engine(name), engine(name, pages=9)
    want, got = rich.run(asked), poor.run(asked)
    self.assertEqual(rich.stats['preempted'], 0)
    self.assertGreater(poor.stats['preempted'], 0)
    for (a,), (b,) in zip(want, got):
      families.check_same(a, b)
    self.assertEqual(poor.stats['pages_free'], 9)

  def test_cancelled_streams_leave_every_page_free(self):
    run = engine()
    for seed in range(100):
      [request] = requests(1, seed=seed, new=20)
      events = run.stream(request)
      for _ in range(seed % 4):
        next(events, None)
      events.close()
      for event in run.step():
        self.assertEqual(event.finish, 'cancelled')
    self.assertFalse(run.busy())
    self.assertEqual(run.stats['pages_free'], run.stats['pages'])
    self.assertEqual((run.stats['running'], run.stats['waiting']), (0, 0))

  def test_no_program_is_compiled_after_the_warm_up(self):
    self.check_compiles_nothing('gqa')

  @parameterized.parameters([n for n in families.NAMES if n != 'gqa'])
  @pytest.mark.slow
  def test_nor_with_other_caches(self, name):
    self.check_compiles_nothing(name)

  def check_compiles_nothing(self, name):
    lines = []
    run = engine(name, contexts=(16, CONTEXT), rows=(1, 3), steps=2)
    run.warm_up(lines.append)
    before = run.stats['compilations']
    self.assertLen(lines, before)
    answers = run.run(mixed())
    self.assertLen(answers, 300)
    self.assertEqual(run.stats['compilations'], before)

  @parameterized.parameters('mask', 'accept')
  def test_a_grammar_that_gives_up_fails_its_own_answer_alone(self, where):
    # llguidance has limits that an answer may meet in its middle.
    class Gives:
      calls, ended = 0, False

      def matcher(self, *_):
        return self

      def mask(self):
        self.meets('mask')
        return np.full(-(-tiny.VOCAB // 32), -1, np.int32)

      def accept(self, token):
        self.meets('accept')
        return True

      def meets(self, what):
        self.calls += what == where
        if self.calls == 3:
          raise InputError('grammar: too many states')

    asked = requests(3, seed=5)
    alone = engine(text=SmallBytes()).run(asked[1:])
    asked[0] = dataclasses.replace(asked[0], grammar=Gives())
    run = engine(text=SmallBytes())
    (failed,), *others = run.run(asked)
    self.assertEqual(failed.finish, 'error')
    self.assertIn('too many states', failed.error)
    self.assertEqual([a.tokens for [a] in others], [a.tokens for [a] in alone])
    self.assertEqual(run.stats['pages_free'], run.stats['pages'])

  def test_nor_for_weights_that_were_put_on_a_device(self):
    # As a run's are when they are read back.
    held = jax.device_put(families.variables('gqa'), jax.devices()[0])
    run = engine(variables=held, rows=(3,), budget=8)
    run.warm_up()
    before = run.stats['compilations']
    run.run(requests(2))
    self.assertEqual(run.stats['compilations'], before)

  @parameterized.parameters('gqa', 'nsa', 'v4')
  def test_garbage_where_nothing_is_cached_changes_nothing(self, name):
    asked = requests(3, seed=4)
    want = engine(name).run(asked)
    run = engine(name)
    spoil = lambda a: jax.numpy.full_like(a, jax.numpy.nan)
    run._store = jax.tree.map(spoil, run._store)
    self.assertEqual(run.run(asked), want)

  def test_the_scratch_page_is_never_written(self):
    run = engine('v3')
    run.run(requests(4, seed=6))
    for pool in run._store.pages:
      self.assertEqual(float(abs(pool[:, 0]).max()), 0)

  def test_new_weights_are_used_at_once(self):
    [request] = requests(1, seed=8)
    run = engine()
    old = run.run([request])
    new = tiny.draw(families.model('gqa'), seed=5)
    run.load(new)
    # Neither known nor found: the weights' number is in the hash, too.
    self.assertEmpty(run._scheduler.pages._known)
    got = run.run([request])
    self.assertNotEqual(got[0][0].tokens, old[0][0].tokens)
    self.assertEqual(got[0][0].usage.cached_tokens, 0)
    self.assertEqual(got, engine(variables=new).run([request]))

  def test_rows_of_another_salt_share_nothing(self):
    run = engine()
    prompt = tuple(range(1, 30))
    use = lambda salt: run.run([Request(prompt, 2, GREEDY, salt=salt)])[0][0]
    self.assertEqual(use('a').usage.cached_tokens, 0)
    self.assertEqual(use('b').usage.cached_tokens, 0)
    self.assertEqual(use('a').usage.cached_tokens, 24)

  def test_several_answers_share_their_prompt(self):
    prompt, how = tuple(range(1, 30)), Sampling(seed=4)
    run = engine()
    [answers] = run.run([Request(prompt, 8, how, n=3)])
    self.assertLen({a.tokens for a in answers}, 3)
    for index, answer in enumerate(answers):
      seeded = dataclasses.replace(how, seed=4 + index)
      [[alone]] = engine().run([Request(prompt, 8, seeded)])
      self.assertEqual(answer.tokens, alone.tokens)

  def test_echo_scores_the_prompt_as_the_trainer_does(self):
    [request] = requests(1, seed=9, echo=True, logprobs=3)
    [[answer]] = engine('v3').run([request])
    want = trained('v3', request.prompt)
    self.assertIsNone(answer.prompt_logprobs[0])
    for t, entry in enumerate(answer.prompt_logprobs[1:]):
      token = request.prompt[t + 1]
      self.assertEqual(entry.token, token)
      self.assertAlmostEqual(entry.logprob, want[t, token], places=5)
      self.assertEqual(entry.top[0][0], want[t].argmax())
      self.assertAlmostEqual(entry.top[0][1], want[t].max(), places=5)

  def test_echo_of_a_preempted_prompt_scores_each_token_once(self):
    old = Request(tuple(range(1, 8)), 40, GREEDY)
    new = Request(tuple(range(1, 47)), 3, GREEDY, echo=True)
    run = engine(pages=9, budget=8, prefills=1)
    _, [got] = run.run([old, new])
    self.assertGreater(run.stats['preempted'], 0)
    want = trained('gqa', new.prompt)
    self.assertIsNone(got.prompt_logprobs[0])
    found = [(p.token, p.logprob) for p in got.prompt_logprobs[1:]]
    tokens, logprobs = zip(*found)
    self.assertEqual(tokens, new.prompt[1:])
    wanted = want[np.arange(45), list(tokens)]
    np.testing.assert_allclose(logprobs, wanted, rtol=0, atol=1e-5)

  def test_echo_of_one_token_has_one_entry(self):
    [[answer]] = engine().run([Request((3,), 2, GREEDY, echo=True)])
    self.assertEqual(answer.prompt_logprobs, (None,))

  def test_a_deterministic_engine_gives_the_same_bits_after_a_prefix(self):
    run = engine(deterministic=True)
    first = tuple(range(1, 9))
    [[one]] = run.run([Request(first, 20, GREEDY)])
    turn = Request((*first, *one.tokens), 10, GREEDY, logprobs=0)
    alone = engine(deterministic=True).run([turn])
    self.assertEqual(run.run([turn]), alone)

  @parameterized.parameters(
    {'budget': 256},  # more than a context
    {'budget': 256, 'deterministic': True},
    {'slots': 1, 'budget': 1, 'steps': 1},
    {'page': 100},
    {'page': 7, 'contexts': (10, CONTEXT)},
    {'rows': (2, 5)},
    {'chunks': ((2, 7), (1, 3), (9, 1000))},
  )
  def test_odd_sizes_change_no_answer(self, **sizes):
    asked = requests(3, seed=2, new=10, most=50)
    run = engine(**sizes)
    for request, (answer,) in zip(asked, run.run(asked)):
      check_trained(self, 'gqa', request, answer)
    self.assertEqual(run.stats['pages_free'], run.stats['pages'])

  def test_expert_loads_are_counted_for_each_request(self):
    run = engine('v3', routing=True)
    asked = requests(2, seed=3)
    numbers = [run.submit(r) for r in asked]
    while run.busy():
      run.step()
    moe = families.config('v3').moe
    for number in numbers:
      load = run.expert_load(number)
      self.assertEqual(load.shape, (2, moe.experts))
      np.testing.assert_array_equal(load.sum(axis=1), 12 * moe.top_k)


class ConfigTest(absltest.TestCase):
  def test_no_chunk_is_longer_than_the_context(self):
    cfg = EngineConfig(context=40, budget=256)
    self.assertEqual(cfg.chunk_buckets(), ((1, 5), (4, 10), (1, 40)))

  def test_given_chunks_are_cut_to_slots_and_context(self):
    cfg = EngineConfig(slots=2, context=40, chunks=((1, 8), (4, 64), (2, 99)))
    self.assertEqual(cfg.chunk_buckets(), ((1, 8), (2, 40)))
    same = dataclasses.replace(cfg, deterministic=True, budget=16)
    self.assertEqual(same.chunk_buckets(), ((1, 16),))

  def test_chunks_are_pairs(self):
    for chunks in ((), (8,), ((1, 0),), ((1, 2, 3),), ((1, 2.0),)):
      with self.assertRaisesRegex(InputError, 'engine.chunks = .*: must be'):
        EngineConfig(chunks=chunks)

  def test_drafts_are_made_in_a_bucket_of_more_rows_than_slots(self):
    cfg = EngineConfig(slots=3, rows=(8,), drafts=2)
    self.assertEqual(cfg.drafts_of(8), 2)
    few = dataclasses.replace(cfg, draft_rows=4)
    self.assertEqual(few.drafts_of(8), 0)


class MeshTest(parameterized.TestCase):
  @parameterized.parameters('v3', 'v4', 'dsa', 'nsa', 'gqa', 'engram')
  @pytest.mark.slow
  def test_a_mesh_of_devices_answers_as_one_does(self, name):
    found = fake_devices.run('tests.infer.engine_worker', name, devices=4)
    self.assertLen(found, 3)
    for mesh, (same, error, pages) in found.items():
      self.assertTrue(same, mesh)
      self.assertLess(error, 1e-5, mesh)
      self.assertEqual(pages, 0, mesh)


class BadInputTest(parameterized.TestCase):
  def test_a_tokenizer_of_more_tokens_than_the_model_is_named(self):
    model, variables = families.model('gqa'), families.variables('gqa')
    with self.assertRaisesRegex(
      InputError, 'tokenizer: has 261 tokens, the model 64'
    ):
      Engine(model, variables, text=ByteTokenizer())

  def test_a_model_without_its_head_is_named(self):
    model, variables = families.model('gqa'), families.variables('gqa')
    params = {k: v for k, v in variables['params'].items() if k != 'head'}
    with self.assertRaisesRegex(InputError, r"\['head'\].* missing"):
      Engine(model, {**variables, 'params': params})

  @parameterized.parameters(
    ({'prompt': ()}, 'prompt'),
    ({'prompt': (1.5,)}, 'prompt'),
    ({'prompt': ((1, 2), (3, 4))}, 'prompt'),
    ({'prompt': '12'}, 'prompt'),
    ({'prompt': ('1', '2')}, 'prompt'),
    ({'prompt': b'ab'}, 'prompt'),
    ({'prompt': {3: 1}}, 'prompt'),
    ({'prompt': np.array([1.5], np.float32)}, 'prompt'),
    ({'prompt': jax.numpy.array([1.0, 2.0])}, 'prompt'),
    ({'prompt': np.zeros((1, 2), int)}, 'prompt'),
    ({'prompt': (1,), 'n': 10**9}, 'n: '),
    ({'prompt': (tiny.VOCAB,)}, 'vocabulary of 64'),
    ({'prompt': (-1,)}, 'vocabulary'),
    ({'prompt': (1,) * CONTEXT}, 'engine.context'),
    ({'prompt': (1,), 'max_new_tokens': 0}, 'max_new_tokens'),
    ({'prompt': (1,), 'n': 0}, 'n = 0'),
    ({'prompt': (1,), 'logprobs': 21}, 'logprobs'),
    ({'prompt': (1,), 'stop_strings': ('x',)}, 'stop_strings'),
    ({'prompt': (1,), 'stop_strings': ('',)}, 'stop_strings'),
  )
  def test_a_request_that_cannot_be_answered_is_one_line(self, fields, named):
    with self.assertRaisesRegex(InputError, named) as caught:
      engine().submit(Request(**fields))
    self.assertNotIn('\n', str(caught.exception))

  @parameterized.parameters(
    ({'temperature': -1}, 'temperature'),
    ({'temperature': float('nan')}, 'temperature'),
    ({'top_p': 0}, 'top_p'),
    ({'min_p': 2}, 'min_p'),
    ({'repetition_penalty': 0}, 'repetition_penalty'),
    ({'presence_penalty': float('inf')}, 'presence_penalty'),
    ({'logit_bias': ((1,),)}, 'logit_bias'),
    ({'seed': 2**64}, 'seed'),
    ({'seed': 0.5}, 'seed'),
    ({'logit_bias': ((1, 1e300),)}, 'logit_bias'),
    ({'frequency_penalty': -1e300}, 'frequency_penalty'),
    ({'stop': [1]}, 'stop'),
  )
  def test_wrong_settings_are_one_line(self, fields, named):
    with self.assertRaisesRegex(InputError, named):
      Sampling(**fields)

  @parameterized.parameters(
    [(2, 3)], [[2, 3]], [np.array([2, 3])], [jax.numpy.array([2, 3])],
    [range(2, 4)], [[np.int64(2), jax.numpy.int32(3)]],
  )  # fmt: skip
  def test_any_row_of_whole_numbers_is_a_prompt(self, prompt):
    self.assertEqual(Request(prompt).prompt, (2, 3))

  def test_seeds_count_modulo_two_to_the_64(self):
    run = engine()
    many = Request((1,), 9, Sampling(seed=2**64 - 1), n=2)
    [[last, first]] = run.run([many])
    want = run.run([Request((1,), 9, Sampling(seed=s)) for s in (-1, 0)])
    self.assertEqual([last.tokens, first.tokens], [a.tokens for [a] in want])

  def test_a_wrong_request_in_a_list_leaves_nothing_behind(self):
    run = engine()
    with self.assertRaisesRegex(InputError, 'vocabulary'):
      run.run([Request((1, 2), 2), Request((tiny.VOCAB,), 2)])
    self.assertFalse(run.busy())

  def test_variables_of_another_model_are_one_line_and_change_nothing(self):
    run = engine()
    fine = [Request((1, 2, 3), 6, GREEDY)]
    want = run.run(fine)
    narrow = jax.tree.map(lambda a: a[..., :1], families.variables('gqa'))
    for wrong in ({}, families.variables('mla'), narrow):
      with self.assertRaisesRegex(InputError, 'variables') as caught:
        run.load(wrong)
      self.assertNotIn('\n', str(caught.exception))
    self.assertEqual(run.run(fine)[0][0].tokens, want[0][0].tokens)

  def test_a_request_that_never_fits_the_pages_is_refused(self):
    with self.assertRaisesRegex(InputError, 'engine.pages'):
      engine(pages=2).submit(Request((1,) * 10, 20))

  def test_a_full_queue_is_refused_and_goes_on(self):
    run = engine(queue=2)
    run.submit(Request((1, 2), 4))
    run.submit(Request((1, 3), 4))
    with self.assertRaises(EngineBusy):
      run.submit(Request((1, 4), 4))
    while run.busy():
      run.step()
    run.submit(Request((1, 4), 4))

  def test_a_request_with_wrong_numbers_fails_alone(self):
    variables = families.variables('gqa')
    params = dict(variables['params'])
    params['embed'] = params['embed'].at[7].set(np.nan)
    run = engine(variables={**variables, 'params': params})
    fine = [Request((1, 2, 3), 6, GREEDY), Request((4, 5), 6, GREEDY)]
    want = run.run(fine)
    bad = Request((1, 7, 3), 6, GREEDY)
    [[first], [wrong], [second]] = run.run([fine[0], bad, fine[1]])
    self.assertEqual(wrong.finish, 'error')
    self.assertIn('not finite', wrong.error)
    self.assertEqual([first.tokens, second.tokens], [a.tokens for [a] in want])


if __name__ == '__main__':
  absltest.main()
