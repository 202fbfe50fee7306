"""Wrong calls of the face: each is one line that names what to give instead."""

import inspect
import json
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

import deepseek_jax as ds
from tests import tiny

_CONFIG = tiny.config('gqa')
_MODEL = tiny.model('gqa')
_VARIABLES = tiny.variables('gqa')
_OTHER = tiny.variables('mha')
_PARAMS = _VARIABLES['params']
_TOKENS = jnp.ones((1, 4), jnp.int32)
_AUX = {'segments': [({'ffn': {'load': jnp.ones((1, 2, 8))}},)]}


def _generate(*args, **kwargs):
  return ds.generate(*args, **{'max_new_tokens': 2, 'temperature': 0} | kwargs)


# name -> (call, words of the line)
_CALLS = {
  'build a function': (lambda: ds.build(ds.presets.v3_tiny), 'call it: v3_t'),
  'build a model': (lambda: ds.build(_MODEL), 'give its configuration'),
  'build a run': (lambda: ds.build(ds.recipes.v3_tiny()), 'config.model'),
  'build a name': (lambda: ds.build('v3_tiny'), "is 'v3_tiny', no Transformer"),
  'build a dict': (lambda: ds.build(ds.to_dict(_CONFIG)), 'ds.from_dict('),
  'count a model': (
    lambda: ds.plan.count_parameters(_MODEL), 'config: is a Model'
  ),
  'estimate a function': (
    lambda: ds.plan.estimate(ds.presets.v3), 'call it: v3()'
  ),
  'lists': (lambda: _MODEL.apply(_VARIABLES, [[1, 2]]), 'as jnp.array([['),
  'a flat row': (
    lambda: _MODEL.apply(_VARIABLES, _TOKENS[0]), 'tokens[None] is one row'
  ),
  'floats': (lambda: _MODEL.apply(_VARIABLES, _TOKENS * 1.0), 'float32[1, 4]'),
  'no token': (lambda: _MODEL.apply(_VARIABLES, _TOKENS * 999_999), '999999'),
  'below zero': (lambda: _MODEL.apply(_VARIABLES, _TOKENS * -3), '-3 at [row'),
  'params alone': (
    lambda: _MODEL.apply(_PARAMS, _TOKENS), "a dict without 'params'; give"
  ),
  'no buffers': (
    lambda: _MODEL.apply({'params': _PARAMS}, _TOKENS), "without 'buffers'"
  ),
  'no variables': (lambda: _MODEL.apply(None, _TOKENS), 'variables: None'),
  "another model's": (
    lambda: _MODEL.apply(_OTHER, _TOKENS),
    "['attention']['k'] is [2, 16, 4, 6] here and [2, 16, 2, 6] in the model",
  ),
  'another family': (
    lambda: _MODEL.apply(tiny.variables('mla'), _TOKENS), 'is absent here'
  ),
  'no cache': (
    lambda: _MODEL.apply(_VARIABLES, _TOKENS, cache=8), 'cache: is 8; give'
  ),
  'no key': (lambda: _MODEL.init(None), 'key: is None; give a seed'),
  'a text as key': (lambda: _MODEL.init('a'), "key: is 'a'"),
  'two keys': (
    lambda: _MODEL.init(jax.random.split(jax.random.key(0))), 'one key'
  ),
  'a text as size': (lambda: _MODEL.init_cache('a', 8), "batch = 'a'"),
  'a negative size': (lambda: _MODEL.init_cache(1, -8), 'slots = -8'),
  'head of params': (lambda: _MODEL.head(_PARAMS), "without 'params'"),
  'cast of params': (lambda: _MODEL.cast(_PARAMS), "without 'params'"),
  'a misspelt statistic': (
    lambda: ds.moe_statistics(_AUX, 'laod'), "name = 'laod': must be one of"
  ),
  'statistics of an output': (
    lambda: ds.moe_statistics((1, 2), 'load'), 'out.aux'
  ),
  'a flat prompt': (
    lambda: _generate(_MODEL, _VARIABLES, [1, 2, 3]), 'as [[1, 2, 3]]'
  ),
  'a text as prompt': (
    lambda: _generate(_MODEL, _VARIABLES, ['hello']), "'hello' is no row"
  ),
  'a key that is none': (
    lambda: _generate(_MODEL, _VARIABLES, [[1]], temperature=1, key='a'),
    "key: is 'a'",
  ),
  'a stop that is no tuple': (
    lambda: _generate(_MODEL, _VARIABLES, [[1]], stop=5), 'as (2,)'
  ),
  'a fraction of tokens': (
    lambda: _generate(_MODEL, _VARIABLES, [[1]], max_new_tokens=2.5),
    'max_new_tokens = 2.5',
  ),
  'a configuration for a model': (
    lambda: _generate(_CONFIG, _VARIABLES, [[1]]), 'ds.build(config) makes one'
  ),
  'swapped': (lambda: _generate(_VARIABLES, _MODEL, [[1]]), 'model: is a dict'),
  'generate of params': (
    lambda: _generate(_MODEL, _PARAMS, [[1]]), "a dict without 'params'"
  ),
  "generate of another model's": (
    lambda: _generate(_MODEL, _OTHER, [[1]]), 'here and [2, 16, 2, 6]'
  ),
  'a name of the hub': (
    lambda: ds.hf.load('deepseek-ai/DeepSeek-V2-Lite'), 'hf download'
  ),
  'an unknown dtype': (lambda: ds.hf.load('/tmp', dtype='f3'), "dtype = 'f3'"),
  'no folder': (lambda: ds.hf.load(None), 'path: is None; give a folder'),
  'no changes': (lambda: ds.changed(_CONFIG, 'dim=2'), 'changes: is'),
  'fit a name': (lambda: ds.fit('v3_tiny', 'runs/x'), 'ds.recipes.v3_tiny()'),
  'fit a function': (
    lambda: ds.fit(ds.recipes.v3_tiny, 'runs/x'), 'call it: v3_tiny()'
  ),
  'fit a model': (lambda: ds.fit(_CONFIG, 'runs/x'), 'no RunConfig'),
  'fit nowhere': (lambda: ds.fit(ds.recipes.v3_tiny(), None), 'is None; give'),
  'load nothing': (lambda: ds.load(''), "workdir: is ''"),
  'an engine of a configuration': (
    lambda: ds.Engine(_CONFIG, _VARIABLES), 'no Model; ds.build(config)'
  ),
  'an engine of a number': (
    lambda: ds.Engine(_MODEL, _VARIABLES, 8), 'cfg: is 8, no EngineConfig'
  ),
  'a step of a configuration': (
    lambda: ds.train_step(_CONFIG, ds.recipes.v3_tiny().train), 'no Model; ds.b'
  ),
  'a step of a run': (
    lambda: ds.train_step(_MODEL, ds.recipes.v3_tiny()), 'no TrainConfig'
  ),
  'held out text': (
    lambda: ds.bits_per_byte(_MODEL, _VARIABLES, 'abc'), "heldout: is 'abc'"
  ),
  'the cache of a function': (
    lambda: ds.plan.cache(ds.presets.v3), 'config: is the function v3'
  ),
  'decoding by a function': (
    lambda: ds.plan.decode_flops(ds.presets.v3, 9), 'as in ds.presets.v3()'
  ),
  'saved in another order': (
    lambda: ds.hf.save(_CONFIG, _VARIABLES, 'x'), 'give a folder, then'
  ),
  'writers by name': (
    lambda: ds.fit(ds.recipes.v3_tiny(), 'runs/x', writers='tb'),
    "writers: holds 'tb'",
  ),
  'talk to the hub': (
    lambda: ds.talk('deepseek-ai/DeepSeek-V2-Lite', ['a']), 'hf download'
  ),
  'no metrics': (lambda: ds.read_metrics('/nowhere'), 'is no folder'),
  'no routing': (lambda: ds.read_routing('/nowhere'), 'no such file; name'),
  'nothing merged': (lambda: ds.merged(_CONFIG, {}), "without 'params'"),
  'statistics of nothing': (lambda: ds.moe_statistics({}, 'load'), 'out.aux'),
  'rows of no token': (
    lambda: _MODEL.apply(_VARIABLES, _TOKENS[:, :0]), 'hold none; give'
  ),
  'no rows': (lambda: _MODEL.apply(_VARIABLES, _TOKENS[:0]), 'hold none; give'),
  'a temperature as sampling': (
    lambda: ds.Request((1, 2), 2, 0.7), 'no Sampling; as ds.Sampling(0.7)'
  ),
  'decoding of less than nothing': (
    lambda: ds.plan.decode_flops(_CONFIG, -1), 'length = -1'
  ),
}  # fmt: skip


class CallsTest(parameterized.TestCase):
  @parameterized.parameters(*_CALLS)
  def test_is_one_line_that_names_the_fix(self, name):
    call, words = _CALLS[name]
    with self.assertRaises(ds.InputError) as caught:
      call()
    self.assertIn(words, str(caught.exception))
    self.assertLen(str(caught.exception).splitlines(), 1)
    self.assertLess(len(str(caught.exception)), 300)

  def test_seeds_are_keys(self):
    one, two = (
      _generate(_MODEL, _VARIABLES, [[1]], temperature=1.0, key=key)
      for key in (np.int64(3), jax.random.key(3))
    )
    self.assertEqual(one, two)

  def test_variables_may_be_cast_traced_or_of_an_adapted_model(self):
    _MODEL.cast(_MODEL.cast(_VARIABLES))
    jax.eval_shape(_MODEL.apply, jax.eval_shape(_MODEL.init, 0), _TOKENS)
    config = ds.changed(_CONFIG, {'lora': ds.LoRAConfig(('q',))})
    model = ds.build(config)
    like = jax.eval_shape(model.init, 0)
    jax.eval_shape(model.apply, like, _TOKENS)
    jax.eval_shape(model.apply, jax.eval_shape(_MODEL.init, 0), _TOKENS)

  @parameterized.parameters(
    (jnp.float32, 'float32'),
    (jnp.bfloat16, 'bfloat16'),
    (np.float32, 'float32'),
    (np.dtype('float32'), 'float32'),
    (jnp.dtype('bfloat16'), 'bfloat16'),
    ('bfloat16', 'bfloat16'),
  )
  def test_a_dtype_is_its_name(self, dtype, name):
    self.assertEqual(
      ds.changed(_CONFIG, {'compute.dtype': dtype}).compute.dtype, name
    )
    plain = ds.to_dict(_CONFIG)
    plain['compute']['dtype'] = dtype
    self.assertEqual(
      ds.from_dict(ds.TransformerConfig, plain).compute.dtype, name
    )
    self.assertEqual(ds.OptimizerConfig(moments=dtype).moments, name)
    self.assertEqual(ds.plan.Training(dispatch=dtype).dispatch, name)
    if name == 'bfloat16':
      self.assertEqual(ds.ExchangeConfig(combine=dtype).combine, name)

  def test_a_checkpoint_is_saved_in_a_dtype_or_its_name(self):
    model, variables = tiny.model('llama'), tiny.variables('llama')
    for dtype in (jnp.bfloat16, 'bfloat16', np.dtype('float32'), None):
      with tempfile.TemporaryDirectory() as folder:
        ds.hf.save(folder, model.config, variables, dtype=dtype)
        told = json.loads(Path(folder, 'config.json').read_text())
      want = 'float32' if dtype is None else np.dtype(dtype).name
      self.assertEqual(told['torch_dtype'], want)

  @parameterized.parameters(jnp.float16, int, np.int32, 'float31')
  def test_another_dtype_is_refused(self, dtype):
    with self.assertRaisesRegex(ds.InputError, r'compute\.dtype'):
      ds.changed(_CONFIG, {'compute.dtype': dtype})

  def test_a_model_is_one_line(self):
    text = repr(tiny.model('v3'))
    self.assertLen(text.splitlines(), 1)
    self.assertLess(len(text), 120)
    count = ds.plan.count_parameters(tiny.config('gqa')).total
    self.assertIn(f'{count:,} weights', repr(_MODEL))
    for words in ('3 layers of width 16', 'mla', '3 of 8 experts', 'float32'):
      self.assertIn(words, text)

  def test_help_says_shapes(self):
    shapes = {
      'apply': ('[B T] int32', '[B T V] float32', 'segment_ids'),
      'init': ('float32',),
      'init_cache': ('slots',),
      'head': ('[D V]',),
      'cast': ('dtype',),
    }
    for name, words in shapes.items():
      text = inspect.getdoc(getattr(_MODEL, name))
      for word in words:
        self.assertIn(word, text)


if __name__ == '__main__':
  absltest.main()
