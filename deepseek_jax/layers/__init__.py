"""One idea per file: <Idea>Config, the <Idea> module and its pure helpers."""
