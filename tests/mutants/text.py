"""Bugs of what begins and ends a text, of streams and of chat templates."""

from tests.mutants.mutant import Mutant

_BOUNDARIES = 'deepseek_jax/data/boundaries.py'
_BOUNDARIES_TEST = 'tests/data/boundaries_test.py'
_DECODING = 'deepseek_jax/data/decoding.py'
_STREAM = 'deepseek_jax/infer/text.py'
_STREAM_TEST = 'tests/infer/text_test.py'
_WORKER = 'deepseek_jax/infer/template_worker.py'
_TEMPLATE_TEST = 'tests/infer/template_test.py'

MUTANTS = (
  Mutant(
    'prompt_without_its_beginning',
    _BOUNDARIES,
    '  begins, closes = tokenizer.around\n',
    '  begins, closes = (), ()\n',
    (f'{_BOUNDARIES_TEST}::ids_of_text_equal_transformers',),
    'llama.cpp 1303, lm-evaluation-harness 1465, sglang 3728',
  ),
  Mutant(
    'beginning_twice',
    _BOUNDARIES,
    '    begun = bool(self.begins) and tuple(ids[: len(self.begins)])'
    ' == self.begins\n',
    '    begun = False\n',
    (f'{_BOUNDARIES_TEST}::gets_no_second',),
    'DeepSeek-R1 151, NeMo-RL 855: a prompt that spells the beginning',
    fast=True,
  ),
  Mutant(
    'generation_config_unread',
    _BOUNDARIES,
    "    *_ends(generation, 'generation_config.json'),\n",
    '',
    (f'{_BOUNDARIES_TEST}::every_file_is_heard',),
    'vllm 4180: Llama 3 ends its turns with a second token',
  ),
  Mutant(
    'one_end_of_several',
    'deepseek_jax/infer/chat.py',
    '    if token in ends:\n',
    '    if token == ends[0]:\n',
    ('tests/infer/chat_test.py::every_end_ends_an_answer',),
    'textgen 5885, unsloth 384: the answer runs on',
  ),
  Mutant(
    'stream_gives_up_after_four_tokens',
    _STREAM,
    '  for token in ids:\n',
    '  for n, token in enumerate(ids):\n'
    '    if n % 4 == 3:\n'
    '      yield decoder.finish()\n'
    '      decoder = tokenizer.decoder(after)\n',
    (f'{_STREAM_TEST}::joined_it_is_the_decoded_text',),
    'sglang 31598, exo 1691, mlx-vlm 1778: emoji of many tokens',
  ),
  Mutant(
    'byte_tokens_one_by_one',
    _DECODING,
    "return '' if self._waits or self._is_open(token) else self.finish()",
    "return '' if self._waits else self.finish()",
    (f'{_STREAM_TEST}::a_run_of_byte_tokens_waits_for_its_end',),
    'a character of several <0x..> tokens is text only as a whole',
    fast=True,
  ),
  Mutant(
    'tojson_escapes_html',
    _WORKER,
    "  out.filters['tojson'] = _to_json\n",
    '',
    (f'{_TEMPLATE_TEST}::is_that_of_published_templates',),
    'jinja2 has a filter of that name, with other arguments and output',
  ),
)
