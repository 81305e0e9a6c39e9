"""What turns latents into pixels, by the names that requests have: the VAE's decoder, and a tiny one beside it."""

from __future__ import annotations

FULL, TINY = "full", "tiny"
TINY_DECODER = "tiny_decoder"
"""The component of a tiny autoencoder's decoder, in bundles that have one beside their VAE."""
DECODERS = {FULL: "vae_decoder", TINY: TINY_DECODER}
