"""Distillation against the numbers of GKD, closed gradients, its own forms."""

import functools
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl.testing import absltest, parameterized
from jax.interpreters import partial_eval as pe

import deepseek_jax as ds
from deepseek_jax.rl import distill
from tests import tiny
from tests.rl import objectives_test

# (beta, temperature): GKD's loss and the norms of its gradients by hidden and
# head, by TRL 1.16 in float64 on `drawn()`.
GKD = {
  (0.0, 1.0): (2.987611331046313, 0.8058208919736249, 0.6815320464455689),
  (0.0, 2.0): (1.167656011468375, 0.2568386610002196, 0.20771221906570522),
  (0.1, 1.0): (0.18338221157634163, 0.0264395939704468, 0.021906988977665753),
  (0.1, 2.0): (0.09263169159092165, 0.015699678911208367, 0.01313434989386831),
  (0.5, 1.0): (0.427432932859862, 0.05940817463091664, 0.0435282466568067),
  (0.5, 2.0): (0.23187493293929806, 0.03476372360598075, 0.02867680824569754),
  (1.0, 1.0): (3.986333999877921, 1.1276704889876168, 0.7655245312459379),
  (1.0, 2.0): (1.3005623259079166, 0.28287044897945984, 0.20375023019269928),
}
MASK = np.array([[1, 1, 1, 0], [1, 0, 1, 1]], np.float32)


def drawn():
  """Returns student's states and head, then the teacher's, [V ...] heads."""
  rng = np.random.default_rng(7)
  shapes = (2, 4, 6), (2, 4, 8), (11, 6), (11, 8)
  student, teacher, head, teacher_head = (rng.normal(size=s) for s in shapes)
  return student, head.T, teacher, teacher_head.T


def plain(hidden, head, teacher, teacher_head, beta, temperature):
  """Returns the mean divergence from whole logits."""
  soft = lambda x: jax.nn.log_softmax(x / temperature)
  value = distill.divergence(
    soft(hidden @ head), soft(teacher @ teacher_head), beta
  )
  return (value * MASK).sum() / MASK.sum()


class DivergenceTest(parameterized.TestCase):
  @parameterized.parameters(*GKD)
  def test_loss_and_gradients_are_those_of_gkd(self, beta, temperature):
    with jax.enable_x64(True):
      args = tuple(map(jnp.asarray, drawn()))
      loss, grads = jax.value_and_grad(plain, argnums=(0, 1))(
        *args, beta, temperature
      )
      norms = (float(jnp.linalg.norm(g.reshape(-1))) for g in grads)
      np.testing.assert_allclose(
        [float(loss), *norms], GKD[beta, temperature], rtol=1e-12
      )

  @parameterized.parameters(
    *((case, 3, 1) for case in GKD),
    ((0.0, 2.0), 1, 3),
    ((0.5, 2.0), 3, 3),
    ((1.0, 2.0), 9, 3),
  )
  def test_chunks_of_hidden_states_give_the_same(self, case, chunk, teachers):
    beta, temperature = case
    student, head, teacher, teacher_head = drawn()
    heads = [teacher_head] + [teacher_head + n for n in range(1, teachers)]
    # Of several the second row has the last, which is another.
    which = np.array([0, teachers - 1], np.int32)
    taught = distill.Taught(
      jnp.float32(teacher), jnp.float32(distill.stacked(heads)), which
    )

    def chunked(hidden, head):
      total = distill.divergence_sum(
        hidden,
        head,
        taught,
        MASK,
        beta=beta,
        temperature=temperature,
        chunk=chunk,
      )
      return total / MASK.sum()

    def whole(hidden, head):
      soft = lambda x: jax.nn.log_softmax(x / temperature)
      logits = [t @ heads[w] for t, w in zip(teacher, which)]
      value = distill.divergence(
        soft(hidden @ head), soft(jnp.asarray(logits)), beta
      )
      return (value * MASK).sum() / MASK.sum()

    both = lambda f: jax.value_and_grad(f, argnums=(0, 1))
    got = both(chunked)(jnp.float32(student), jnp.float32(head))
    with jax.enable_x64(True):
      want = both(whole)(jnp.asarray(student), jnp.asarray(head))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      np.testing.assert_allclose(g, w, rtol=2e-5, atol=1e-6)

  @parameterized.parameters(0.0, 0.3, 1.0)
  def test_several_teachers_add_up_by_their_shares(self, beta):
    student, head, teacher, teacher_head = drawn()
    shares = distill.DistillConfig(teachers={'a': 1, 'b': 0.5, 'c': 2.5}).shares
    self.assertEqual(shares, (0.25, 0.125, 0.625))
    states = np.stack([teacher, teacher**2, -teacher], axis=2)
    heads = np.stack([teacher_head, 2 - teacher_head, teacher_head**2])

    def chunked(hidden, head):
      taught = distill.Taught(
        jnp.float32(states), jnp.float32(heads), shares=shares
      )
      total = distill.divergence_sum(
        hidden, head, taught, MASK, beta=beta, temperature=2.0, chunk=3
      )
      return total / MASK.sum()

    whole = lambda hidden, head: sum(
      share * plain(hidden, head, states[:, :, k], heads[k], beta, 2.0)
      for k, share in enumerate(shares)
    )
    both = lambda f: jax.value_and_grad(f, argnums=(0, 1))
    got = both(chunked)(jnp.float32(student), jnp.float32(head))
    with jax.enable_x64(True):
      want = both(whole)(jnp.asarray(student), jnp.asarray(head))
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      np.testing.assert_allclose(g, w, rtol=2e-5, atol=1e-6)

  @parameterized.parameters(0.0, 0.3, 1.0)
  def test_equal_distributions_have_no_loss_and_no_gradient(self, beta):
    with jax.enable_x64(True):
      logits = jnp.asarray(np.random.default_rng(0).normal(size=9))
      teacher = jax.nn.log_softmax(logits)
      value = lambda z: distill.divergence(jax.nn.log_softmax(z), teacher, beta)
      loss, gradient = jax.value_and_grad(value)(logits)
      self.assertAlmostEqual(loss, 0, delta=1e-15)
      np.testing.assert_allclose(gradient, np.zeros(9), atol=1e-15)

  def test_gradient_of_the_reverse_kl(self):
    with jax.enable_x64(True):
      rng = np.random.default_rng(0)
      z, t = jnp.asarray(rng.normal(size=(2, 9)))
      log_t = jax.nn.log_softmax(t)
      value = lambda z: distill.divergence(jax.nn.log_softmax(z), log_t, 1.0)
      kl, gradient = jax.value_and_grad(value)(z)
      p, log_p = jax.nn.softmax(z), jax.nn.log_softmax(z)
      want = p * (log_p - log_t - kl)
      np.testing.assert_allclose(gradient, want, atol=1e-15)
      # The exact expectation of the sampled tokens' policy gradient.
      made = distill.sampled_advantages(log_p, log_t)
      score = jax.jacobian(jax.nn.log_softmax)(z)  # [token, logit]
      sampled = -(p[:, None] * made[:, None] * score).sum(0)
      np.testing.assert_allclose(gradient, sampled, atol=1e-15)

  def test_gradient_of_the_forward_kl(self):
    with jax.enable_x64(True):
      z, t = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9)))
      log_t = jax.nn.log_softmax(t)
      value = lambda z: distill.divergence(jax.nn.log_softmax(z), log_t, 0.0)
      want = jax.nn.softmax(z) - jax.nn.softmax(t)
      np.testing.assert_allclose(jax.grad(value)(z), want, atol=1e-15)

  def test_logits_exist_for_a_chunk_alone(self):
    N, V = 64, 512
    hidden, head = jnp.ones((1, N, 4)), jnp.ones((4, V))
    taught = distill.Taught(jnp.ones((1, N, 4)), jnp.ones((1, 4, V)))

    def loss(hidden, head, chunk):
      total = functools.partial(distill.divergence_sum, beta=1.0, chunk=chunk)
      return total(hidden, head, taught, jnp.ones((1, N)))

    def temporaries(chunk):
      run = jax.jit(jax.grad(lambda h, w: loss(h, w, chunk), argnums=(0, 1)))
      return run.lower(hidden, head).compile().memory_analysis()

    small, large = (temporaries(c).temp_size_in_bytes for c in (8, N))
    self.assertLess(small, 4 * N * V)  # less than one array of all logits
    self.assertLess(4 * small, large)

  @pytest.mark.slow
  def test_trl_gives_these_numbers(self):
    os.environ['TRL_EXPERIMENTAL_SILENCE'] = '1'
    import torch
    from trl.experimental.gkd import GKDTrainer

    torch.set_default_dtype(torch.float64)
    self.addCleanup(torch.set_default_dtype, torch.float32)
    student, head, teacher, teacher_head = map(torch.tensor, drawn())
    labels = torch.where(torch.tensor(MASK) > 0, 1, -100)
    for (beta, temperature), want in GKD.items():
      h, w = (a.clone().requires_grad_(True) for a in (student, head))
      loss = GKDTrainer.generalized_jsd_loss(
        h @ w,
        teacher @ teacher_head,
        labels,
        beta=beta,
        temperature=temperature,
      )
      loss.backward()
      got = loss.item(), h.grad.norm().item(), w.grad.norm().item()
      np.testing.assert_allclose(got, want, rtol=1e-12)

  @pytest.mark.slow
  def test_so_does_trls_chunked_divergence(self):
    import torch
    from trl.trainer import distillation_trainer

    student, head, teacher, teacher_head = map(torch.tensor, drawn())
    for (beta, temperature), want in GKD.items():
      h, w = (
        a.float().contiguous().requires_grad_(True) for a in (student, head.T)
      )
      loss, _, count = distillation_trainer._chunked_divergence_loss(
        h,
        teacher.float(),
        w,
        teacher_head.T.float().contiguous(),
        torch.tensor(MASK),
        beta,
        temperature=temperature,
      )
      loss.backward()
      got = loss.item(), h.grad.norm().item(), w.grad.norm().item()
      np.testing.assert_allclose(got, want, rtol=2e-6)
      self.assertEqual(int(count), MASK.sum())


class DistillationTest(parameterized.TestCase):
  def batch(self, *width, heads=None):
    made = tiny.documents(4, 13)
    rng = np.random.default_rng(0)
    if heads is None:
      heads = np.zeros((1, width[-1], tiny.VOCAB))
    return made | {
      'trained': (rng.random(made['tokens'].shape) < 0.7).astype(np.float32),
      'teacher_hidden': np.float32(rng.normal(size=(4, 13, *width))),
      'teacher_heads': np.float32(heads),
    }

  def log_probs(self, batch, temperature):
    """Returns the student's log-probs, and the weights of the tokens."""
    model, variables = tiny.model('llama'), tiny.variables('llama')
    inputs = ds.next_token(batch)
    out = jax.jit(model.apply)(
      variables,
      inputs.tokens,
      positions=inputs.positions,
      segment_ids=inputs.segments,
    )
    weights = np.asarray(inputs.weights * batch['trained'][:, 1:], np.float64)
    return numpy_soft(np.float64(out.logits) / temperature), weights

  def test_a_student_distils_from_hidden_states_of_another_width(self):
    model, variables = tiny.model('llama'), tiny.variables('llama')
    head = np.float32(np.random.default_rng(1).normal(size=(5, tiny.VOCAB)))
    batch = self.batch(5, heads=head[None])
    cfg = distill.DistillConfig(beta=1.0, temperature=2.0)
    got = objectives_test.found(model, variables, batch, cfg)
    student, weights = self.log_probs(batch, 2.0)
    states = batch['teacher_hidden'][:, :-1].astype(np.float64)
    value = numpy_kl(student, numpy_soft(states @ head / 2))
    want = 4 * (value * weights).sum() / weights.sum()
    np.testing.assert_allclose(got['loss'], want, rtol=2e-5)

  def test_micro_batches_share_the_heads(self):
    one = ds.changed(tiny.config('llama'), {'layout': ((('dense',), 1),)})
    model = ds.build(one)
    rng = np.random.default_rng(1)
    batch = self.batch(2, 5, heads=rng.normal(size=(2, 5, tiny.VOCAB)))
    named = {'a': 1.0, 'b': 3.0}
    cfg = distill.DistillConfig(teachers=named)
    after = []
    for parts in (1, 2):
      train = ds.TrainConfig(
        1e6,
        ds.BatchConfig(4, accumulate=parts),
        schedule=ds.ScheduleConfig('constant', peak=1e-2, warmup=0),
      )
      state = ds.initial_state(model, train, tiny.draw(model))
      state, out = jax.jit(ds.train_step(model, train, cfg))(state, batch)
      after.append((state.params, out['loss'], out['grad_norm']))
    for a, b in zip(*map(jax.tree.leaves, after)):
      np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

  @parameterized.parameters(1, 3)
  def test_a_step_holds_logits_of_a_chunk_alone(self, teachers):
    V, B, T = 4096, 8, 512
    model = ds.build(ds.changed(tiny.config('llama'), {'vocab_size': V}))
    named = {str(k): 1.0 for k in range(teachers)}
    cfg = distill.DistillConfig(teachers=named)
    train = ds.TrainConfig(1e6, ds.BatchConfig(B))
    init = lambda key: ds.initial_state(model, train, model.init(key))
    state = jax.eval_shape(init, jax.random.key(0))
    of = jax.ShapeDtypeStruct
    batch = {
      'tokens': of((B, T + 1), jnp.int32),
      'trained': of((B, T + 1), jnp.float32),
      'teacher_hidden': of((B, T + 1, teachers, 5), jnp.float32),
      'teacher_heads': of((teachers, 5, V), jnp.float32),
    }
    program = jax.make_jaxpr(ds.train_step(model, train, cfg))(state, batch)
    used, _ = pe.dce_jaxpr(program.jaxpr, [True] * len(program.out_avals))
    sizes = sorted(math.prod(a.shape) for a in arrays(used))
    self.assertEqual(sizes[-1], 1024 * V)  # a chunk's, of 4096 tokens

  @parameterized.parameters(0.0, 1.0)
  def test_a_student_learns_the_distribution_of_a_markov_source(self, beta):
    # The teacher's state is its token, its head the source's log-probs.
    V, rng = 8, np.random.default_rng(3)
    source = rng.dirichlet(np.ones(V), size=V)
    tokens = np.zeros((8, 17), np.int32)
    tokens[:, 0] = rng.integers(V, size=8)
    for place in range(16):
      odds = source[tokens[:, place]]
      tokens[:, place + 1] = [rng.choice(V, p=p) for p in odds]
    batch = {
      'tokens': tokens,
      'trained': np.ones(tokens.shape, np.float32),
      'teacher_hidden': np.eye(V, dtype=np.float32)[tokens],
      'teacher_heads': np.float32(np.log(source))[None],
    }
    model = ds.build(
      ds.changed(
        tiny.config('llama'), {'layout': ((('dense',), 1),), 'vocab_size': V}
      )
    )
    train = ds.TrainConfig(
      8 * 16 * 400.0,
      ds.BatchConfig(8),
      schedule=ds.ScheduleConfig('cosine', peak=2e-2, warmup=10, end=1e-3),
    )
    state = ds.initial_state(model, train, tiny.draw(model))
    step = jax.jit(ds.train_step(model, train, distill.DistillConfig(beta)))
    for _ in range(400):
      state, _ = step(state, batch)
    variables = {'params': state.params, 'buffers': state.buffers}
    out = jax.jit(model.apply)(variables, tokens[:, :-1])
    student = numpy_soft(np.float64(out.logits))
    teacher = np.log(source)[tokens[:, :-1]]
    # Both ways, against the source itself.
    self.assertLess(numpy_kl(teacher, student).mean(), 1e-4)
    self.assertLess(numpy_kl(student, teacher).mean(), 1e-4)

  def test_its_own_teacher_teaches_nothing(self):
    model, variables = tiny.model('llama'), tiny.variables('llama')
    batch = self.batch(5)
    inputs = ds.next_token(batch)
    out = jax.jit(model.apply)(
      variables,
      inputs.tokens,
      positions=inputs.positions,
      segment_ids=inputs.segments,
    )
    hidden = np.pad(out.hidden, ((0, 0), (0, 1), (0, 0)))
    own = {
      'teacher_hidden': hidden,
      'teacher_heads': model.head(variables)[None],
    }
    got = objectives_test.found(
      model, variables, batch | own, distill.DistillConfig()
    )
    self.assertAlmostEqual(got['loss'], 0, places=5)

  def test_what_does_not_fit_is_refused(self):
    model, variables = tiny.model('llama'), tiny.variables('llama')
    cfg = distill.DistillConfig()
    refused = lambda message, batch, cfg=cfg: self.assertRaisesRegex(
      ds.InputError,
      message,
      objectives_test.run_of(model, cfg),
      variables,
      batch,
    )
    other = self.batch(5, heads=np.zeros((1, 5, 9)))
    refused('the teacher has a vocabulary of 9 tokens, the student of', other)
    with self.assertRaisesRegex(ds.InputError, 'vocabularies of .8, 9. tokens'):
      distill.stacked([np.zeros((5, 9)), np.zeros((4, 8))])
    two = np.zeros((2, 5, tiny.VOCAB))
    refused("no 'teacher' .B., which of", self.batch(5, heads=two))
    refused('states of 3 teachers and 2 heads', self.batch(3, 5, heads=two))
    refused('objective.teachers 1', self.batch(2, 5, heads=two))
    for name in ('teacher_hidden', 'teacher_heads'):
      batch = self.batch(5)
      del batch[name]
      refused(f"no '{name}'", batch)

  def test_teachers_are_folders_with_weights(self):
    for teachers in (
      {},
      {'a': 0},
      {'a': -1.0},
      {'': 1.0},
      {'a': True},
      {'a': '1'},
      {1: 1.0},
      {'a': float('inf')},
      {'a': float('nan')},
      ['a'],
      'a',
    ):
      with self.assertRaisesRegex(ds.InputError, 'objective.teachers = '):
        distill.DistillConfig(teachers=teachers)


def numpy_soft(logits):
  """Returns log-probs of logits, in float64."""
  top = logits.max(-1, keepdims=True)
  return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def numpy_kl(p, q):
  """Returns KL(p || q) of log-probs."""
  return (np.exp(p) * (p - q)).sum(-1)


def arrays(jaxpr):
  """Yields the shaped values of a program, those of its parts too."""
  for equation in jaxpr.eqns:
    yield from (v.aval for v in equation.outvars if hasattr(v.aval, 'shape'))
    for part in jax.tree.leaves(
      list(equation.params.values()), is_leaf=lambda p: hasattr(p, 'eqns')
    ):
      inner = getattr(part, 'jaxpr', part)
      if hasattr(inner, 'eqns'):
        yield from arrays(inner)


if __name__ == '__main__':
  absltest.main()
