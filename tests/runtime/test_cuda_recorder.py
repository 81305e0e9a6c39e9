"""`CudaRecorder` on the stand-in for CUDA: what the driver refuses must not spoil what comes after. No GPU is used."""

from __future__ import annotations

import gc
import logging
import threading
from collections.abc import Iterator

import pytest
import torch
from fewstep.engines.streams import MOST, take_stream
from fewstep.errors import FewstepError
from fewstep.runtime.device.cuda_graphs import CaptureError, CudaRecorder, GraphCache, GraphKey
from standin_cuda import Driver, stand_in_cuda

CUDA = torch.device("cuda", 0)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Driver]:
    with stand_in_cuda(monkeypatch) as driver:
        yield driver


def key(index: int) -> GraphKey:
    return GraphKey(kind="tick", shape=(index,), slots=1, rows=1, tokens=1, evaluations=1, engines=())


def add_one(state: torch.Tensor) -> None:
    state.add_(1.0)


def test_work_is_captured_on_the_callers_stream_and_replayed(driver: Driver) -> None:
    state, stream = torch.zeros(3, device=CUDA), take_stream(torch, 0)
    with torch.cuda.stream(stream):
        graph = CudaRecorder(CUDA).capture(lambda: add_one(state))
        after = state.clone()
        graph.replay()
        graph.replay()
    assert torch.equal(state, after + 2)
    assert (driver.captured, driver.launches) == (1, 2)
    assert driver.device_synchronisations == 0


def test_the_default_stream_is_refused(driver: Driver) -> None:
    with pytest.raises(CaptureError, match="default stream"):
        CudaRecorder(CUDA).capture(lambda: None)


@pytest.mark.parametrize("failing", ["raises", "synchronises its stream", "synchronises the device", "reads a value"])
def test_a_failed_capture_spoils_none_that_follow(
    driver: Driver, failing: str, caplog: pytest.LogCaptureFixture
) -> None:
    state, stream = torch.zeros(3, device=CUDA), take_stream(torch, 0)
    graphs = GraphCache(CudaRecorder(CUDA))

    def bad() -> None:
        add_one(state)
        if driver.capturing() is None:
            return
        if failing == "raises":
            raise RuntimeError("a kernel is missing")
        if failing == "synchronises its stream":
            stream.synchronize()
        elif failing == "synchronises the device":
            torch.cuda.synchronize()
        else:
            bool(state[0] > 0)

    with torch.cuda.stream(stream), caplog.at_level(logging.WARNING):
        graphs.run(key(1), lambda: add_one(state), restore=[state])
        graphs.run(key(2), bad, restore=[state])
        assert torch.equal(state, torch.full((3,), 2.0)), "the failed work is done, once"
        for index in range(3, 8):
            graphs.run(key(index), lambda: add_one(state), restore=[state])
            graphs.run(key(1), lambda: add_one(state), restore=[state])
    assert torch.equal(state, torch.full((3,), 12.0))
    assert (graphs.captures, graphs.failures) == (6, 1)
    assert "could not be captured" in caplog.text
    assert not driver.recording, "the allocator still records"
    assert not driver.captures


def test_a_pool_that_lost_its_last_graph_is_not_used_again(driver: Driver) -> None:
    state, stream = torch.zeros(3, device=CUDA), take_stream(torch, 0)
    graphs = GraphCache(CudaRecorder(CUDA), most=2)
    with torch.cuda.stream(stream):
        for index in range(6):
            graphs.run(key(index), lambda: add_one(state))
        graphs.clear()
        gc.collect()
        graphs.run(key(9), lambda: add_one(state))
    assert (graphs.captures, graphs.failures, graphs.evictions) == (7, 0, 4)


def test_threads_capture_one_after_the_other(driver: Driver) -> None:
    """A capture of another thread, with its warm-up and its synchronisation, must not fall into this one's."""
    inside, failures = threading.Semaphore(1), []

    def work() -> None:
        state, stream = torch.zeros(3, device=CUDA), take_stream(torch, 0)
        recorder = CudaRecorder(CUDA)

        def body() -> None:
            if not inside.acquire(blocking=False):
                failures.append("two at once")
                return
            add_one(state)
            inside.release()

        try:
            with torch.cuda.stream(stream):
                for _ in range(20):
                    recorder.capture(body)
        except RuntimeError as error:
            failures.append(str(error))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    assert driver.captured == 80


def test_a_stream_is_in_one_hand_at_a_time(driver: Driver) -> None:
    held = [take_stream(torch, 0) for _ in range(MOST)]
    assert len({s.cuda_stream for s in held}) == MOST
    with pytest.raises(FewstepError, match="all 32 streams of CUDA device 0 are taken"):
        take_stream(torch, 0)
    free = held.pop(5).cuda_stream
    gc.collect()
    assert take_stream(torch, 0).cuda_stream == free
