"""The exporter's side of the gate: torch's own outputs in float32, made in a process of their own."""
