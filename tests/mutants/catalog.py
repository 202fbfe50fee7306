"""All known bugs."""

from tests.mutants import attention, routing, training

MUTANTS = (*attention.MUTANTS, *routing.MUTANTS, *training.MUTANTS)
