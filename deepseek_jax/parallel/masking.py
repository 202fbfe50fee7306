"""Gives the score of what a query does not attend to."""

# Finite: where nothing is visible a softmax gives a mean, and never NaN, which
# would pass through every product after it.
MASKED = -1e30
