"""Renders the chat format of DeepSeek-V3.2 (its encoding is code, no template).

Reasoning stays while tools are called, and is dropped when a user speaks again.
"""

from deepseek_jax.infer.formats.dsml import Dsml, DsmlFormat
from deepseek_jax.infer.formats.message import Message, Talk, to_json
from deepseek_jax.infer.formats.pieces import (
  ASSISTANT,
  BOS,
  DSML,
  END_THINK,
  EOS,
  THINK,
  USER,
  Piece,
  mark,
  spelled,
)

_TOOLS = """

## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<｜DSML｜function_calls>" block like the\
 following as part of your reply to the user:
<｜DSML｜function_calls>
<｜DSML｜invoke name="$FUNCTION_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME"\
 string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$FUNCTION_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜function_calls>

String and scalar parameters should be specified as is without any escaping or\
 quotes, while lists and objects should use JSON format. The "string" attribute\
 should be set to "true" for string type parameters and "false" for other types\
 (numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should\
 strongly consider outputting a thinking block. Here is an example:

<｜DSML｜function_calls>
...
</｜DSML｜function_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
"""
_END_TOOLS = '\n</functions>\n'
_ANSWER = (
  '\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema'
  ' to reply:\n'
)


class V32(DsmlFormat):
  """Renders for DeepSeek-V3.2: thinks only if asked to."""

  name = 'v32'
  thinks = False
  marks = (BOS, EOS, USER, ASSISTANT, THINK, END_THINK, DSML)
  markup = Dsml('function_calls', empty='\n')

  def _render(self, talk: Talk, generation: bool) -> list[Piece]:
    """Returns the pieces of a conversation."""
    messages = list(talk.messages)
    if not messages or messages[0].role != 'system':
      messages.insert(0, Message('system'))
    last_user = max(
      (n for n, m in enumerate(messages) if m.role == 'user'), default=-1
    )
    out = [mark(BOS)]
    for n, message in enumerate(messages):
      recent = talk.thinking and n >= last_user
      opens = [mark(THINK if recent else END_THINK)]
      last = n == len(messages) - 1
      if message.role == 'system':
        out.append(Piece(message.content))
        out += self._system(talk) if n == 0 else []
      elif message.role == 'user':
        out += [mark(USER), Piece(message.content)]
        if not last or generation:
          out += [mark(ASSISTANT), *opens]
      elif message.role == 'tool':
        out += self._results(messages, n)
        if last or messages[n + 1].role != 'tool':
          out.append(Piece('\n</function_results>'))
          if not last or generation:
            out += [Piece('\n\n'), *opens]
      else:
        out += self._answer(message, recent, out)
    if generation and not messages[-1].prefix:
      if messages[-1].role not in ('user', 'tool'):
        # The published encoding opens an answer only behind these.
        out += [mark(ASSISTANT), mark(THINK if talk.thinking else END_THINK)]
      out += self.markup.opening() if talk.required else []
    return out

  def _results(self, messages: list[Message], n: int) -> list[Piece]:
    """Returns one result; results stand in the order of their calls."""
    first = n
    while messages[first - 1].role == 'tool':
      first -= 1
    end = n + 1
    while end < len(messages) and messages[end].role == 'tool':
      end += 1
    ordered = sorted(messages[first:end], key=lambda m: m.answers)
    opens = '\n\n<function_results>' if n == first else ''
    content = ordered[n - first].content
    return [Piece(f'{opens}\n<result>{content}</result>')]

  def _system(self, talk: Talk) -> list[Piece]:
    """Returns what the first system message says of tools and answers."""
    out = []
    if talk.tools:
      tools = '\n'.join(map(to_json, talk.tools))
      out += spelled(_TOOLS, DSML, THINK, END_THINK)
      out.append(Piece(tools + _END_TOOLS))
    if talk.answer:
      schema = talk.answer
      schema = {'type': schema} if isinstance(schema, str) else schema
      out.append(Piece(_ANSWER + to_json(schema)))
    return out
