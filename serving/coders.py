"""What is done with a request beside its evaluations: encoding before them and decoding after, on a thread each."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext

from ..errors import EngineFailedError, FewstepError
from ..runtime.pipeline import Pipeline
from ..runtime.prepare import Prepared
from ..runtime.result import ResultPart, make_result
from .cpu_lock import CpuLock
from .estimates import Estimates
from .job import FirstPass, Job, check_prepared
from .observe import Observer
from .policy import STRETCHES
from .ticket import Stage, Ticket
from .worker import DueWorker

log = logging.getLogger("fewstep.serving")


class Coders:
    """The encode thread, which makes jobs of tickets, and the decode thread, which settles tickets with images.

    most_images: of a request. `prepared` gets a job that is ready for slots; `failed` gets the error once the decoder
    has raised.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        most_images: int,
        estimates: Estimates,
        prepared: Callable[[Job], None],
        failed: Callable[[FewstepError], None],
        observer: Observer,
        cpu: CpuLock,
    ) -> None:
        self._pipeline, self._most_images, self._estimates = pipeline, most_images, estimates
        self._prepared, self._failed, self._observer, self._cpu = prepared, failed, observer, cpu
        self._encoder, self._decoder = DueWorker("fewstep-encode"), DueWorker("fewstep-decode")

    def encode(self, ticket: Ticket, prepare: Callable[[], Prepared] | None = None) -> None:
        """Have texts and pictures encoded and noise drawn; `prepare` in place of `Pipeline.prepare`."""
        self._encode(ticket, prepare or (lambda: self._pipeline.prepare(ticket.request)))

    def decode(self, job: Job) -> None:
        """Have a job's latents made images, and its ticket settled, or its second pass begun."""
        self._decoder.put(_turn(job.ticket), lambda: self._decode(job))

    def close(self, timeout: float | None = None) -> None:
        """Stop after what is queued."""
        self._encoder.close(timeout)
        self._decoder.close(timeout)

    def _encode(self, ticket: Ticket, prepare: Callable[[], Prepared], first: FirstPass | None = None) -> None:
        self._encoder.put(ticket.arrival + ticket.alone_s, lambda: self._prepare(ticket, prepare, first))

    def _prepare(self, ticket: Ticket, prepare: Callable[[], Prepared], first: FirstPass | None) -> None:
        if ticket.done:
            return
        try:
            with self._cpu.before_ticks() if first or ticket.request.has_image else nullcontext():
                prepared = prepare()
                ticket.stages += _prepared_in(prepared, time.monotonic())
            check_prepared(prepared, dict(self._pipeline.engines["unet"].inputs), self._most_images)
        except FewstepError as error:
            ticket.fail(error)
            return
        except BaseException as error:  # a thread of the server outlives whatever a library raises
            log.exception("%s could not be prepared", ticket.name)
            ticket.fail(FewstepError(f"the request could not be prepared ({type(error).__name__})"))
            return
        self._observer.observe("text", prepared.text_ms)
        self._estimates.observe_text(prepared.text_ms)
        if prepared.latents is not None:
            self._observer.observe("encode_image", prepared.encode_image_ms)
        self._prepared(Job(ticket, prepared, first))

    def _decode(self, job: Job) -> None:
        ticket, prepared = job.ticket, job.prepared
        if ticket.done:
            return
        try:
            with self._cpu.before_ticks():
                began = time.monotonic()
                images = self._pipeline.vae.decode(job.out, decoder=prepared.request.decoder)
                ended = time.monotonic()
        except FewstepError as error:
            ticket.fail(error)
            return
        except BaseException as error:  # a thread of the server outlives whatever a library raises
            log.exception("%s could not be decoded", ticket.name)
            self._failed(EngineFailedError(f"decoding failed ({type(error).__name__})"))
            return
        ticket.stages.append(Stage(name="decode", began_at=began, ended_at=ended))
        self._observer.observe("decode", 1e3 * (ended - began))
        self._estimates.observe_decode(prepared.shape, 1e3 * (ended - began), job.images)
        part = ResultPart(
            device=self._pipeline.device.name,
            images=images,
            latents=job.out,
            denoise_ms=1e3 * (job.denoised_at - job.admitted_at),
            decode_ms=1e3 * (ended - began),
            ticks=job.ticks,
        )
        total_ms = 1e3 * (ended - job.began_at)
        result = make_result(self._pipeline.bundle, prepared, [part], total_ms=total_ms, queue_ms=job.queue_ms)
        passes = ticket.passes
        if passes is None:
            ticket.finish(result)
        elif job.first is not None:
            ticket.finish(passes.result(job.first.result, result))
        else:
            first = FirstPass(result=result, ended_at=ended)
            self._encode(ticket, lambda: self._pipeline.prepare(passes.second(result)), first)


def _prepared_in(prepared: Prepared, ended: float) -> list[Stage]:
    """The stages of a request that was prepared just now: pictures are encoded after the texts."""
    between = ended - 1e-3 * prepared.encode_image_ms
    stages = [Stage(name="text_encoder", began_at=between - 1e-3 * prepared.text_ms, ended_at=between)]
    if prepared.latents is not None:
        stages.append(Stage(name="image_encoder", began_at=between, ended_at=ended))
    return stages


def _turn(ticket: Ticket) -> float:
    """What the decoder goes by: when the ticket is due, or if that is past, when it would be if it had come now."""
    now, allowed_s = time.monotonic(), STRETCHES[-1] * ticket.alone_s
    due = ticket.arrival + allowed_s
    if ticket.deadline is not None:
        due = min(due, ticket.deadline)
    return due if due > now else now + allowed_s
