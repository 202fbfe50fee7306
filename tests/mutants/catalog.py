"""All known bugs."""

from tests.mutants import (
  attention,
  corpus,
  engram,
  routing,
  sparse,
  training,
  v4,
)

MUTANTS = (
  *attention.MUTANTS,
  *routing.MUTANTS,
  *training.MUTANTS,
  *sparse.MUTANTS,
  *v4.MUTANTS,
  *engram.MUTANTS,
  *corpus.MUTANTS,
)
