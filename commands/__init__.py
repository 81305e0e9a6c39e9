"""One module a verb: `define(parser)` adds its arguments, `execute(options)` does it and returns the exit code."""
