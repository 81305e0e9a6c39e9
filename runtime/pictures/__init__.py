"""Pictures: files, sizes, masks, and the VAE between pixels and latents."""
