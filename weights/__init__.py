"""Weights as they lie in files, by the names that others give them, and what changes them: LoRAs."""
