"""Real time in a gradio app, on the Python API: frames as fast as they come, prompt and sliders at once.

pip install 'fewstep[cpu,export]' gradio
python examples/gradio_live.py [bundle folder]        # without one, the embedded student at 64x64

One session a viewer. gradio sends frames as files over its own queue, which is slower than the page at /live of
`fewstep serve`; this file is for those who build apps in gradio.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import fewstep
import gradio as gr
import numpy as np
from fewstep.serving.live import LiveSession

FRAME_S = 5.0


def open_server() -> fewstep.Server:
    """The server of the bundle on the command line."""
    if len(sys.argv) > 1:
        return fewstep.Server(sys.argv[1], image=True)
    return fewstep.Server("student", image=True, threads=1)


def stream(sessions: dict[str, LiveSession], server: fewstep.Server) -> Any:
    """A generator for one viewer, for as long as he looks."""

    def frames(prompt: str, steps: int, seed: int, noise: str, request: gr.Request) -> Iterator[tuple[Any, str]]:
        name = str(request.session_hash)
        old = sessions.pop(name, None)
        if old is not None:
            old.close()
        settings: dict[str, Any] = {"prompt": prompt, "steps": int(steps), "seed": int(seed), "noise": noise}
        session = sessions[name] = LiveSession(server, **settings)
        for frame in session.frames(timeout=None if noise == "fixed" else FRAME_S):
            stats = session.stats()
            shown = frame.image.repeat(4, axis=0).repeat(4, axis=1) if frame.image.shape[0] < 128 else frame.image
            yield shown, f"{stats.fps:.0f} frames/s, input to frame {stats.latency_p50_ms:.0f} ms (on the server)"

    return frames


def change(sessions: dict[str, LiveSession]) -> Any:
    """An event that changes the viewer's session; what cannot be set is said and changes nothing."""

    def apply(
        prompt: str, steps: int, seed: int, noise: str, strength: float, sketch: Any, request: gr.Request
    ) -> None:
        session = sessions.get(str(request.session_hash))
        if session is None:
            return
        try:
            session.update(prompt=prompt, steps=int(steps), seed=int(seed), noise=noise, strength=float(strength))
            picture = None if sketch is None else np.asarray(sketch["composite"])[..., :3]
            session.push(picture if picture is not None and picture.any() else None)
        except fewstep.FewstepError as error:
            gr.Warning(str(error))

    return apply


def build(server: fewstep.Server) -> gr.Blocks:
    """The app."""
    sessions: dict[str, LiveSession] = {}
    with gr.Blocks(title="fewstep live") as app:
        with gr.Row():
            with gr.Column():
                prompt = gr.Textbox("a red circle on a blue background", label="Prompt")
                steps = gr.Slider(1, 12, value=2, step=1, label="Steps")
                seed = gr.Number(0, label="Seed", precision=0)
                noise = gr.Radio(["fixed", "walk", "fresh"], value="walk", label="Noise")
                strength = gr.Slider(0.05, 1.0, value=0.6, label="Strength of a drawing")
                sketch = gr.Sketchpad(label="Drawing", type="numpy", canvas_size=(256, 256))
                start = gr.Button("Start")
            with gr.Column():
                picture = gr.Image(label="Frames", streaming=True, format="jpeg")
                figures = gr.Markdown()
        start.click(stream(sessions, server), [prompt, steps, seed, noise], [picture, figures], api_name="frames")
        inputs = [prompt, steps, seed, noise, strength, sketch]
        for component in inputs:
            component.change(change(sessions), inputs, None, queue=False, show_progress="hidden")
        app.unload(leave(sessions))
    return app


def leave(sessions: dict[str, LiveSession]) -> Any:
    """The event of a viewer who goes: his session ends."""

    def apply(request: gr.Request) -> None:
        session = sessions.pop(str(request.session_hash), None)
        if session is not None:
            session.close()

    return apply


if __name__ == "__main__":
    with open_server() as running:
        build(running).launch(server_name="127.0.0.1")
