"""What a run records: metrics, routing, timeline, last steps."""
