"""Checkpoints on disk: folders, single files, LoRAs; understood without being loaded."""
