"""diffusers as it comes: torch, eager."""

from diffusers_loop import DiffusersLoop
from protocol import serve

if __name__ == "__main__":
    serve(DiffusersLoop)
