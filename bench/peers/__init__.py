"""Workers, one script a contender: each runs in its own virtual environment and imports nothing of fewstep's."""
