"""The HTTP face of a server: starlette and msgspec are imported here and nowhere else."""
