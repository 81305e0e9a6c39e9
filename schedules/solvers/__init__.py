"""The samplers, one function each, run on symbols by `fewstep.schedules.compile`."""
