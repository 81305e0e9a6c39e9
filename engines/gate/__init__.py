"""The gate: how far an engine may be from torch in float32, the cases it is judged by, and its verdicts."""
