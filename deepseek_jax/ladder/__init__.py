"""Climbs from a dense model to V4, one idea at a time, at equal compute.

Every rung is a run that differs from the one below in one idea. What is
trained is decided in `rungs`, how long in `sizes` and `trials`; `costs` has
the planner's figures, `table` and `figure` show what was measured.
"""

from deepseek_jax.ladder.rungs import RUNGS, Rung, config, names
from deepseek_jax.ladder.sizes import SIZES, LadderSize, Shape, published
