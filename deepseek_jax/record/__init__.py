"""Records what a run leaves: metrics, routing, timeline, last steps."""
