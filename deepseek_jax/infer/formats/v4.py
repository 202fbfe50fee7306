"""Renders the chat formats of DeepSeek-V4 and V4.1.

Reasoning of earlier turns is dropped, unless tools may be called: then all of
it stays. Results of tools are part of the user's turn, in the order of their
calls. V4.1 has a mark for system messages, which stay where they are; V4 moves
them to the front.
"""

import itertools

from deepseek_jax.errors import InputError
from deepseek_jax.infer.formats.dsml import Dsml, DsmlFormat
from deepseek_jax.infer.formats.message import (
  Message,
  Talk,
  to_json,
  to_short_json,
)
from deepseek_jax.infer.formats.pieces import (
  ASSISTANT,
  BOS,
  DSML,
  END_THINK,
  EOS,
  REMINDER,
  SYSTEM,
  THINK,
  USER,
  Piece,
  mark,
  spelled,
)

_EFFORTS = {
  'low': '',
  'high': """\
Reasoning Effort: Absolute maximum with no shortcuts permitted.
You MUST be very thorough in your thinking and comprehensively decompose the\
 problem to resolve the root cause, rigorously stress-testing your logic\
 against all potential paths, edge cases, and adversarial scenarios.
Explicitly write out your entire deliberation process, documenting every\
 intermediate step, considered alternative, and rejected hypothesis to ensure\
 absolutely no assumption is left unchecked.

""",
  'max': """\
Reasoning Effort: Beyond maximum — exhaustive, relentless, and uncompromising.
You MUST reason with the utmost depth and rigor, leaving absolutely nothing to\
 chance: exhaustively decompose the problem into its most fundamental\
 components, trace every causal chain to its root, and resolve the underlying\
 cause rather than any surface symptom.
Do not stop reasoning until you have independently verified the solution from\
 multiple angles and are certain that no assumption remains unchecked and no\
 error remains undiscovered.

""",
}
_SHARES = {'low': 50, 'high': 75, 'max': 100}
_TOOLS = """

## Tools

You have access to a set of tools to help answer the user's question. You can\
 invoke tools by writing a "<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME"\
 string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all\
 other types (numbers, booleans, arrays, objects), pass the value in JSON\
 format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your\
 complete reasoning inside <think>...</think> BEFORE any tool calls or final\
 response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

"""
_END_TOOLS = """

You MUST strictly follow the above defined tool name and parameter schemas to\
 invoke tool calls.
"""
_ANSWER = '## Response Format:\n\n'
_SCHEMA = 'You MUST strictly adhere to the following schema to reply:\n'


class V4(DsmlFormat):
  """Renders for DeepSeek-V4."""

  name = 'v4'
  thinks = True
  efforts = ('low', 'high', 'max')
  roles = ('system', 'user', 'assistant', 'tool', 'latest_reminder')
  marks = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK, DSML, REMINDER)
  markup = Dsml('tool_calls', to_json=to_short_json)
  _to_json = staticmethod(to_short_json)
  _parts_empty = False  # whether a user's empty message takes a paragraph

  def _render(self, talk: Talk, generation: bool) -> list[Piece]:
    """Returns the pieces of a conversation."""
    out = [mark(BOS), *self._system(talk)]
    before, has_text = '', False  # what came last of a user's turn
    for n, message in enumerate(_ordered(talk.messages)):
      if message.role in ('user', 'tool'):
        said = _said(message)
        if not before:
          out.append(mark(USER))
        elif before == 'tool' or self._parts_empty or (has_text and said):
          out.append(Piece('\n\n'))
        has_text = said != '' or (before == 'user' and has_text)
        out.append(Piece(said))
      elif message.role == 'assistant':
        out += self._past(message, talk)
      elif message.role == 'latest_reminder':
        out += [mark(REMINDER), Piece(message.content)]
      else:
        found = self._later_system(message, n)
        out += found
        if not found:  # it stands elsewhere, and parts no turns
          continue
      before = message.role if message.role in ('user', 'tool') else ''
    left_open = talk.messages[-1:] and talk.messages[-1].prefix
    if generation and not left_open:
      out += [mark(ASSISTANT), mark(THINK if talk.thinking else END_THINK)]
      out += self.markup.opening() if talk.required else []
    return out

  def _past(self, message: Message, talk: Talk) -> list[Piece]:
    """Returns an assistant's turn as a later prompt shows it."""
    if talk.thinking and (talk.tools or message.prefix):
      opens, thinking = THINK, True
    else:
      opens, thinking = END_THINK, False
    out = [mark(ASSISTANT), mark(opens)]
    return out + self._answer(message, thinking, out)

  def _system(self, talk: Talk) -> list[Piece]:
    """Returns what stands before all turns."""
    systems = [m.content for m in talk.messages if m.role == 'system']
    systems = [content for content in systems if content]
    effort = _EFFORTS[talk.effort or 'high'] if talk.thinking else ''
    return [
      Piece(effort + '\n\n'.join(systems)),
      *self._tools(talk),
      *self._form(talk),
    ]

  def _later_system(self, message: Message, n: int) -> list[Piece]:
    """Returns a system message in its place: none, as they are in front."""
    del message, n
    return []

  def _tools(self, talk: Talk) -> list[Piece]:
    """Returns the description of the tools."""
    if not talk.tools:
      return []
    tools = [
      {
        'name': tool['name'],
        'description': tool.get('description') or '',
        'parameters': tool.get('parameters') or {},
      }
      for tool in talk.tools
    ]
    text = '\n'.join(map(self._to_json, tools)) + _END_TOOLS
    how = spelled(self._dialect(_TOOLS), DSML, THINK, END_THINK)
    return [*how, Piece(text)]

  def _dialect(self, text: str) -> str:
    """Returns a text of the format with tags as this version writes them."""
    return text

  def _form(self, talk: Talk) -> list[Piece]:
    """Returns the description of the answer's form."""
    if talk.answer is None:
      return []
    if talk.answer == 'json_object':
      return [Piece(self._json_object())]
    return [Piece(f'\n\n{_ANSWER}{_SCHEMA}{self._to_json(talk.answer)}')]

  def _json_object(self) -> str:
    """Returns the wish for any JSON object."""
    return (
      '\n\nYou are a helpful assistant designed to output JSON.\n'
      f'{_ANSWER}Reply with JSON object ONLY.'
    )


class V41(V4):
  """Renders for DeepSeek-V4.1."""

  name = 'v41'
  marks = (*V4.marks, SYSTEM)
  markup = Dsml('calls', blank=' ', empty='\n')
  _to_json = staticmethod(to_json)
  _parts_empty = True

  def _render(self, talk: Talk, generation: bool) -> list[Piece]:
    """Returns the pieces of a conversation."""
    said = tuple(m for m in talk.messages if m.role != 'system' or m.content)
    if talk.messages and not (said or talk.tools or talk.answer):
      talk = talk._replace(effort='')  # as nobody says anything
    return super()._render(talk._replace(messages=said), generation)

  def _past(self, message: Message, talk: Talk) -> list[Piece]:
    """Returns an assistant's turn as a later prompt shows it."""
    if message.prefix and message.content and len(talk.messages) == 1:
      talk = talk._replace(thinking=False)  # what nobody asked for
    return super()._past(message, talk)

  def _check_messages(self, messages: tuple[Message, ...]) -> None:
    """Raises InputError for two reminders in a row: the second is dropped."""
    shown = [m for m in messages if m.role != 'system' or m.content]
    for one, two in itertools.pairwise(shown):
      if one.role == two.role == 'latest_reminder':
        raise InputError(
          'messages: two of role latest_reminder in a row; the chat format v41'
          ' shows one: join them'
        )

  def _system(self, talk: Talk) -> list[Piece]:
    """Returns what stands before all turns, but for later system messages."""
    effort = ''
    if talk.thinking and talk.effort != '':
      effort = (
        f'Reasoning Effort: {_SHARES[talk.effort or "high"]} (range 1-100, the'
        ' higher the value, the more thorough the reasoning)\n\n'
      )
    first = talk.messages[:1]
    content = ''.join(m.content for m in first if m.role == 'system')
    out = [Piece(effort + content), *self._tools(talk), *self._form(talk)]
    return [mark(SYSTEM), *out] if any(p.text for p in out) else []

  def _later_system(self, message: Message, n: int) -> list[Piece]:
    """Returns a system message in its place, but for the first."""
    return [mark(SYSTEM), Piece(message.content)] if n else []

  def _dialect(self, text: str) -> str:
    """Returns a text of the format with tags as this version writes them."""
    return text.replace(DSML, f'{DSML} ').replace('tool_calls>', 'calls>')

  def _json_object(self) -> str:
    """Returns the wish for any JSON object."""
    return f'\n\n{_ANSWER}{_SCHEMA}{to_json({"type": "json_object"})}'


def _said(message: Message) -> str:
  """Returns the text of a user or of a tool."""
  if message.role == 'tool':
    return f'<tool_result>{message.content}</tool_result>'
  return message.content


def _ordered(messages: tuple[Message, ...]) -> list[Message]:
  """Returns messages, results of tools in the order of their calls."""
  out: list[Message] = []
  for message in messages:
    at = len(out)
    while message.role == 'tool' and out[at - 1].role == 'tool':
      if out[at - 1].answers < message.answers:
        break
      at -= 1
    out.insert(at, message)
  return out
