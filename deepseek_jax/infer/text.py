"""Decodes the text of tokens as they come."""

from collections.abc import Iterable, Iterator, Sequence

from deepseek_jax.data.tokenizer import ByteTokenizer, Tokenizer


def decode_stream(
  tokenizer: Tokenizer | ByteTokenizer,
  ids: Iterable[int],
  after: Sequence[int] = (),
) -> Iterator[str]:
  """Yields the text of tokens as they come; joined, it is the decoded text.

  A character that is split over tokens waits until it is whole.

  Args:
    tokenizer: with decoder(after).
    ids: the tokens.
    after: tokens before them, such as a prompt, whose text isn't yielded.
  """
  decoder = tokenizer.decoder(after)
  for token in ids:
    if text := decoder.feed(int(token)):
      yield text
  if text := decoder.finish():
    yield text
