"""Kernels of Triton for what torch's own modules do slowly on a GPU, put into a model's modules."""
