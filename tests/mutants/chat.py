"""Bugs of chat formats, of parsed answers, stop texts and grammars."""

from tests.mutants.mutant import Mutant

_PIECES = 'deepseek_jax/infer/formats/pieces.py'
_PARSE = 'deepseek_jax/infer/formats/parse.py'
_V4 = 'deepseek_jax/infer/formats/v4.py'
_STOPS = 'deepseek_jax/infer/detokenize.py'
_GRAMMAR = 'deepseek_jax/infer/grammar.py'
_FORMATS_TEST = 'tests/infer/formats/formats_test.py'
_PARSE_TEST = 'tests/infer/formats/parse_test.py'
_V4_TEST = 'tests/infer/formats/v4_test.py'
_STOPS_TEST = 'tests/infer/detokenize_test.py'
_GRAMMAR_TEST = 'tests/infer/grammar_test.py'

MUTANTS = (
  Mutant(
    'users_write_special_tokens',
    _PIECES,
    'if piece.special else tokenizer.encode(piece.text)',
    'if piece.special else tokenizer.encode(piece.text, special=True)',
    (f'{_FORMATS_TEST}::text_never_becomes_a_mark',),
    'prompt injection: a message that spells <｜Assistant｜> opens a turn',
    fast=True,
  ),
  Mutant(
    'dsml_mark_is_read_from_text',
    'deepseek_jax/data/tokenizer.py',
    "in ('<>', '｜｜')",
    "in ('<>',)",
    (f'{_FORMATS_TEST}::text_never_becomes_a_mark',),
    'added tokens that a tokenizer.json does not call special',
  ),
  Mutant(
    'texts_are_encoded_apart',
    _PIECES,
    '  for piece in joined(pieces):\n',
    '  for piece in pieces:\n',
    (f'{_FORMATS_TEST}::neighbouring_texts_are_encoded_as_one',),
    'token ids that training never saw, at the border of two strings',
  ),
  Mutant(
    'reasoning_of_old_turns_stays',
    _V4,
    'if talk.thinking and (talk.tools or message.prefix):',
    'if talk.thinking:',
    (f'{_V4_TEST}::text_marks_and_ids_are_deepseeks',),
    'DeepSeek drops the reasoning of earlier turns in plain chats',
  ),
  Mutant(
    'results_in_order_of_arrival',
    _V4,
    '      if out[at - 1].answers < message.answers:\n        break\n',
    '      break\n',
    (f'{_V4_TEST}::text_marks_and_ids_are_deepseeks',),
    'results of parallel calls are told apart by their order alone',
  ),
  Mutant(
    'answer_begins_outside_reasoning',
    _PARSE,
    "state = 'reasoning' if held[at] == _THINK else 'content'",
    "state = 'content'",
    (f'{_PARSE_TEST}::reasoning_that_does_not_end',),
    'vllm: a prompt that ends with <think> gave reasoning as content',
  ),
  Mutant(
    'broken_calls_are_lost',
    _PARSE,
    "    return True, text if text.strip() else '', None\n",
    "    return True, '', None\n",
    (f'{_PARSE_TEST}::dsml',),
    'tool parsers that swallow what they cannot read',
  ),
  Mutant(
    'stop_text_in_one_piece_only',
    _STOPS,
    '    ready = len(held) - max(self._states)\n',
    '    ready = len(held)\n',
    (f'{_STOPS_TEST}::every_split_gives_the_same',),
    'vllm 3574, SwiftLM 126: the beginning of a stop text is shown',
  ),
  Mutant(
    'stop_text_after_a_near_miss',
    _STOPS,
    '        state = borders[state - 1]\n      state += stop[state]',
    '        state = 0\n      state += stop[state]',
    (f'{_STOPS_TEST}::every_split_gives_the_same',),
    'XYXYZ: the match has to fall back, not to start anew',
  ),
  Mutant(
    'padding_tokens_allowed',
    _GRAMMAR,
    'found[:size] & self._known[:size]',
    'found[:size] | ~self._known[:size]',
    (f'{_GRAMMAR_TEST}::padding_and_marks_are_never_allowed',),
    'a vocabulary padded past the tokenizer: ids without text are drawn',
  ),
  Mutant(
    'rollback_forgets_the_end',
    _GRAMMAR,
    '      self._ended, count = False, count - 1\n',
    '      self._ended = False\n',
    (f'{_GRAMMAR_TEST}::rollback_gives_the_masks_of_before',),
    'speculation past an end: one token too many is taken back',
  ),
)
