"""Prompts: their syntax, what each image is told, and the text encoders."""
