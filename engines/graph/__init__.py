"""ONNX graphs as bytes: read, rewritten into fewer nodes, counted. Nothing here needs the package onnx."""
