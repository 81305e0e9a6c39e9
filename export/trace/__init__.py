"""Graphs: the modules that are traced, the trace, and the graphs that travel with the package."""
