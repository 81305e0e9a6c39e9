"""The backends: one file each for what builds, loads and runs engines of one library."""
