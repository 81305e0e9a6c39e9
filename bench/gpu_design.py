"""The steps of `gpu_check.py` about correctness, on the embedded model: each raises where something is wrong."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from fewstep.runtime import load

SAMPLERS = ("euler", "euler_ancestral", "dpmpp_2m", "dpmpp_sde", "unipc", "heun", "lcm", "ddim")


class Design:
    """What a device must do for recordings to be right."""

    def __init__(self, device: str) -> None:
        self.device, self.on_cuda = device, device.startswith("cuda")

    def _student(self, **options: Any) -> Any:
        from fewstep import export  # noqa: F401 - registers the torch backend
        from fewstep.export.embedded import embedded_bundle

        return load(embedded_bundle("student")[0], backend="torch", device=self.device, **options)

    def replays(self) -> dict[str, Any]:
        """Recorded whole requests are what the operations give eagerly, for all that may differ between replays."""
        recorded, eager = (self._student(graphs=g, mode="latency") for g in (True, False))
        worst = 0
        for index, sampler in enumerate(SAMPLERS):
            for guidance in (1.0, 4.0):
                call = {"seed": index, "steps": 3, "sampler": sampler, "schedule": "trailing", "guidance": guidance}
                a, b = (p(f"picture {index}", **call).images.astype(int) for p in (recorded, eager))
                worst = max(worst, int(np.abs(a - b).max()))
        counts = dict(recorded.graph_counts)
        assert counts["failures"] == 0, counts
        assert counts["replays"] == 2 * len(SAMPLERS), counts
        assert worst <= 1, f"a pixel is off by {worst} levels"
        return {"largest_difference": worst, "counts": counts}

    def failed_capture(self) -> dict[str, Any]:
        """A capture that fails on purpose, and good ones after it in the same pool."""
        from fewstep.runtime.device import cuda_graphs
        from fewstep.runtime.device.cuda_graphs import GraphCache, GraphKey

        place = torch.device(self.device if self.on_cuda else "cpu")
        recorder = cuda_graphs.CudaRecorder(place) if self.on_cuda else cuda_graphs.TapeRecorder()
        graphs, state = GraphCache(recorder), torch.zeros(4, device=place)

        def key(index: int) -> GraphKey:
            return GraphKey(kind="tick", shape=(index,), slots=1, rows=1, tokens=1, evaluations=1, engines=())

        def bad() -> None:
            state.add_(1.0)
            bool(state.sum() > 1e9)  # reads a value on the host

        stream = torch.cuda.Stream(place) if self.on_cuda else None
        with torch.cuda.stream(stream) if stream is not None else torch.no_grad():
            graphs.run(key(0), lambda: state.add_(1.0), restore=[state])
            graphs.run(key(1), bad, restore=[state])
            for index in range(2, 8):
                graphs.run(key(index), lambda: state.add_(1.0), restore=[state])
            value = state.tolist()
        assert value == [8.0] * 4, value
        assert (graphs.failures, graphs.captures) == (1, 7), (graphs.failures, graphs.captures)
        return {"captures": graphs.captures, "failures": graphs.failures}

    def threads(self) -> dict[str, Any]:
        """Four threads that capture at once, each with the picture that it gets alone."""
        pipe = self._student(graphs=True)
        expected = [pipe("a ring", seed=i, steps=1 + i).images for i in range(4)]
        fresh, wrong = self._student(graphs=True), list[str]()

        def work(index: int) -> None:
            try:
                for _ in range(5):
                    images = fresh("a ring", seed=index, steps=1 + index).images.astype(int)
                    wrong.extend(["a picture differs"] if np.abs(images - expected[index]).max() > 1 else [])
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")

        workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert not wrong, wrong[:3]
        assert fresh.graph_counts["failures"] == 0
        return {"counts": dict(fresh.graph_counts)}

    def stream_wrap(self) -> dict[str, Any]:
        """More captures than torch has streams, on all of the streams that there are."""
        if not self.on_cuda:
            return {"skipped": "there are no streams here; tests/runtime/test_cuda_recorder.py has a stand-in"}
        from fewstep.engines.streams import MOST, take_stream
        from fewstep.runtime.device.cuda_graphs import CudaRecorder

        place = torch.device(self.device)
        streams = [take_stream(torch, place.index or 0) for _ in range(MOST)]
        recorder, state = CudaRecorder(place), torch.zeros(4, device=place)
        graphs = []
        for index in range(MOST + 8):
            with torch.cuda.stream(streams[index % MOST]):
                graphs.append(recorder.capture(lambda: state.add_(1.0)))
        torch.cuda.synchronize()
        state.zero_()
        for graph in graphs:
            with torch.cuda.stream(streams[0]):
                graph.replay()
        torch.cuda.synchronize()
        assert state.tolist() == [float(len(graphs))] * 4, state.tolist()
        return {"captures": len(graphs), "streams": len({s.cuda_stream for s in streams})}

    def evictions(self) -> dict[str, Any]:
        """Recordings that are dropped while their work is in flight."""
        pipe, exact = self._student(graphs=True, graphs_kept=1), self._student(graphs=False)
        for index in range(12):
            call = {"seed": index, "steps": 1 + index % 3, "sampler": "euler", "schedule": "trailing"}
            a, b = (p("a ring", **call).images.astype(int) for p in (pipe, exact))
            assert np.abs(a - b).max() <= 1
        assert pipe.graph_counts["evictions"] >= 9, pipe.graph_counts
        return {"counts": dict(pipe.graph_counts)}

    def synchronisations(self) -> dict[str, Any]:
        """Ticks that wait for nothing: torch raises at any that do."""
        if not self.on_cuda:
            return {"skipped": "torch counts synchronisations on CUDA alone; tests/runtime/test_host_free.py stands in"}
        pipe = self._student(graphs=False, mode="shared")
        request = pipe.request("a ring", seed=1, steps=4, guidance=3.0)
        prepared = pipe.prepare(request)
        slots = pipe.make_slots(prepared.shape, 1)
        slot = slots.admit(prepared.samplings[0], prepared.gaussians[0])
        slots.tick([slot])
        torch.cuda.set_sync_debug_mode("error")
        try:
            slots.tick([slot])
            slots.tick([slot])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return {"ticks": 2}

    def seeds(self) -> dict[str, Any]:
        """Noise of torch's CUDA generator, as fewstep draws it without a GPU, against the generator itself."""
        if not self.on_cuda:
            return {"skipped": "there is no CUDA generator here"}
        from fewstep.runtime.noise.seeds import make_generator

        threads = torch.cuda.get_device_properties(self.device)
        resident = threads.multi_processor_count * threads.max_threads_per_multi_processor
        equal = {}
        for shape in ((4, 64, 64), (4, 128, 128)):
            own = make_generator(11, f"cuda:{resident}").randn(shape)
            generator = torch.Generator(self.device).manual_seed(11)
            theirs = torch.randn(shape, generator=generator, device=self.device).cpu().numpy()
            equal[str(shape)] = float(np.abs(own - theirs).max())
        assert max(equal.values()) < 1e-5, equal
        return {"largest_difference": equal}
