"""All known bugs."""

from tests.mutants import attention, engram, routing, sparse, training, v4

MUTANTS = (
  *attention.MUTANTS,
  *routing.MUTANTS,
  *training.MUTANTS,
  *sparse.MUTANTS,
  *v4.MUTANTS,
  *engram.MUTANTS,
)
