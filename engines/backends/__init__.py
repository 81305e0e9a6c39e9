"""The backends: what builds, loads and runs engines of one library. A new one is its file and an import here."""

from . import ort_cpu, openvino, ort_cuda, tensorrt_build, torch  # noqa: F401, I001 - in the order of the listings
