"""Where slots lie and how a tick moves them on: NumPy arrays on the CPU, torch tensors on any device."""
