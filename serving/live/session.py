"""`LiveSession`: frames from inputs that keep changing, as few milliseconds after them as the server can make them.

A session is an admission policy over a `Server`'s slots and nothing else. A frame is a request of one image; the next
one is begun as soon as the one before has made its first evaluation, so that the n steps of successive frames stand
in n rows of one evaluation (stream batching), and an input that came meanwhile replaces the one that waited. A frame
from a picture is begun one evaluation earlier, when the picture before it has been encoded: its own is then encoded
while that one is evaluated.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from ...errors import (
    CancelledError,
    EngineFailedError,
    FewstepError,
    QueueFullError,
    UnavailableError,
)
from ...runtime.arrays import UInt8
from ...runtime.prepare import Prepared, latent_shape
from ...runtime.request import Request
from ..server import Server
from ..ticket import Ticket
from .frames import Frame, LiveStats, Meter, Outbox
from .noise import NoisePath
from .pictures import as_pictures, read_picture
from .settings import LiveSettings
from .unchanged import UnchangedFilter

log = logging.getLogger("fewstep.serving")
GIVE_UP_S = 10.0
OF_NOISE = frozenset({"seed", "noise", "walk"})
"""Settings that requests do not hold: a frame draws its own noise."""
ENDS = (UnavailableError, EngineFailedError)


@dataclasses.dataclass(slots=True)
class _Progress:
    """How far a frame is: whether it has been encoded, and whether it has made its first evaluation."""

    prepared: bool = False
    stepped: bool = False


class LiveSession:
    """Frames from a server for one viewer: change anything at any time, take the newest frame when it suits.

    server: a `Server` (its sizes are those a session can make). stream_batch: begin a frame before the one before is
    finished; without, each frame has the server for itself. unchanged: which pictures are not worth a frame.
    on_event: called, on a thread of the server, with each `Frame`, each error that cost a frame, and the number of
    each input that showed nothing new. Keyword arguments beyond are those of `LiveSettings`.

    Thread-safe. A context manager: leaving it ends the session.
    """

    def __init__(
        self,
        server: Server,
        settings: LiveSettings | None = None,
        *,
        stream_batch: bool = True,
        unchanged: UnchangedFilter | None = None,
        on_event: Callable[[Frame | FewstepError | int], object] | None = None,
        **changes: Any,
    ) -> None:
        self.server, self._on_event = server, on_event
        self._settings = (settings or LiveSettings()).changed(changes)
        self._requests = self._compile(self._settings)
        self._stream_batch = stream_batch
        self._filter = unchanged or UnchangedFilter()
        self._outbox, self._meter = Outbox(), Meter()
        self._lock = threading.Condition()
        self._arrived = time.monotonic()
        self._dirty = bool(self._settings.prompt)  # without a prompt the first change begins it
        self._inputs = self._applied = self._index = 0
        self._made = self._unchanged = self._superseded = self._failed = 0
        self._offered: tuple[Any, int, float] | None = None
        self._picture: UInt8 | None = None
        self._position = 0.0
        self._paths: dict[tuple[tuple[int, ...], int], NoisePath] = {}
        self._flying: dict[Ticket, _Progress] = {}
        self._retry_at = 0.0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="fewstep-live", daemon=True)
        self._thread.start()

    @property
    def settings(self) -> LiveSettings:
        return self._settings

    @property
    def requests(self) -> dict[bool, Request]:
        """What frames ask for now, by whether they start from a picture (a placeholder); of the seed's own noise."""
        with self._lock:
            settings, requests = self._settings, self._requests
        return {image: dataclasses.replace(r, seeds=(settings.seed,)) for image, r in requests.items()}

    @property
    def closed(self) -> bool:
        return self._closed

    def update(self, **changes: Any) -> int:
        """Change settings for the frames to come; the number of this input.

        Raises `ArgumentError` for what cannot be made, and leaves everything as it was.
        """
        settings = self._settings.changed(changes)
        requests = self._requests if changes.keys() <= OF_NOISE else self._compile(settings)
        with self._lock:
            self._settings, self._requests = settings, requests
            return self._input()

    def push(self, image: Any) -> int:
        """Offer a picture to start from; the number of this input.

        image: uint8 [H, W, 3], a Pillow image, a path, or the bytes of a PNG, JPEG or WebP file, decoded on the
        session's thread. A picture that has not been begun is replaced by the newer one. `None` goes back to making
        frames from noise. What cannot be decoded costs no more than an error to `on_event`.
        """
        with self._lock:
            self._superseded += self._offered is not None
            if image is None:
                self._offered, self._picture = None, None
                self._filter.forget()
                return self._input()
            self._inputs += 1
            self._offered = (image, self._inputs, time.monotonic())
            self._lock.notify_all()
            return self._inputs

    def take(self, timeout: float | None = 0.0) -> Frame | None:
        """The newest frame, waiting up to `timeout` seconds; `None` when there is none.

        Raises what ended the session.
        """
        frame = self._outbox.take(timeout)
        if frame is not None:
            with self._lock:
                self._lock.notify_all()
        return frame

    def frames(self, *, count: int | None = None, timeout: float | None = None) -> Iterator[Frame]:
        """Frames as they are made, the newest each time; ends after `count`, after `timeout` seconds without one, or
        when the session is closed."""
        taken = 0
        while count is None or taken < count:
            frame = self.take(timeout)
            if frame is None:
                return
            taken += 1
            yield frame

    def stats(self) -> LiveStats:
        return LiveStats(
            inputs=self._inputs,
            unchanged=self._unchanged,
            superseded=self._superseded,
            frames=self._made,
            dropped=self._outbox.dropped,
            failed=self._failed,
            fps=self._meter.fps,
            latency_p50_ms=self._meter.percentile_ms(50),
            latency_p99_ms=self._meter.percentile_ms(99),
        )

    def close(self) -> None:
        """End the session; frames in flight are cancelled."""
        self._end(None)
        self._thread.join(GIVE_UP_S)

    def __enter__(self) -> LiveSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _input(self) -> int:
        """A change of settings has come; with the lock held."""
        self._inputs += 1
        self._applied, self._arrived, self._dirty = self._inputs, time.monotonic(), True
        self._lock.notify_all()
        return self._inputs

    def _compile(self, settings: LiveSettings) -> dict[bool, Request]:
        """The request of a frame from noise and of one from a picture, checked against the server."""
        requests = {image: settings.request(self.server.pipeline, image=image) for image in (False, True)}
        for request in requests.values():
            self.server.check(request)
        return requests

    # --- the admission policy, on the session's own thread ---

    def _run(self) -> None:
        try:
            while True:
                with self._lock:
                    self._lock.wait_for(self._may_begin, self._patience())
                    if self._closed:
                        return
                    if not self._may_begin():
                        continue
                    offered, self._offered = self._offered, None
                self._receive(offered)
                if self._wants():
                    self._begin()
        except FewstepError as error:
            self._end(error)
        except BaseException as error:  # a thread of the server outlives whatever a library raises
            log.exception("a live session ended")
            self._end(FewstepError(f"the live session failed ({type(error).__name__})"))

    def _patience(self) -> float | None:
        return max(0.0, self._retry_at - time.monotonic()) or None

    def _may_begin(self) -> bool:
        """Whether the next frame's turn has come and there may be something to make."""
        if self._closed:
            return True
        ahead = int(self._picture is not None)  # frames that may be encoded while another is evaluated
        evaluations = self._requests[bool(ahead)].program.evaluations
        most = evaluations + 1 + ahead if self._stream_batch else 1
        waiting = [p for p in self._flying.values() if not p.stepped]
        blocked = len(waiting) > ahead or not all(p.prepared for p in waiting)
        if blocked or len(self._flying) >= most or time.monotonic() < self._retry_at:
            return False
        return self._offered is not None or self._wants()

    def _wants(self) -> bool:
        """Something changed, or the noise moves and the last frame was taken."""
        return self._dirty or (self._index > 0 and self._settings.moves and not self._outbox.occupied)

    def _receive(self, offered: tuple[Any, int, float] | None) -> None:
        """Decode the picture that was offered, if it shows something new."""
        if offered is None:
            return
        image, number, arrived = offered
        try:
            request = self._requests[True]
            picture = read_picture(image, (request.width, request.height))
        except FewstepError as error:
            self._fail(error)
            return
        if not self._filter.passes(picture) and not self._dirty:
            self._unchanged += 1
            self._tell(number)
            return
        with self._lock:
            self._picture, self._dirty, self._arrived = picture, True, arrived
            self._applied = max(self._applied, number)

    def _begin(self) -> None:
        with self._lock:
            settings, picture = self._settings, self._picture
            request = self._requests[picture is not None]
            number, arrived = self._applied, self._arrived if self._dirty else None
            self._dirty = False
            index, position = self._index, self._position
        seed = settings.seed + index if settings.noise == "fresh" else settings.seed
        pictures = None if picture is None else as_pictures(picture, (request.width, request.height))
        request = dataclasses.replace(request, seeds=(seed,), pictures=pictures)
        began = time.monotonic() if arrived is None else arrived
        progress = _Progress()

        def prepare() -> Prepared:
            prepared = self.server.pipeline.prepare(request)
            if settings.noise == "walk" and position > 0:
                prepared = dataclasses.replace(prepared, gaussians=self._path(request).at(seed, position)[None])
            with self._lock:
                progress.prepared = True
                self._lock.notify_all()
            return prepared

        try:
            ticket = self.server.submit_request(request, prepare=prepare)
        except QueueFullError as error:
            with self._lock:
                self._dirty |= arrived is not None
                self._retry_at = time.monotonic() + min(error.retry_after_s, 1.0)
            return
        with self._lock:
            self._index += 1
            self._position += settings.walk if settings.noise == "walk" else 0.0
            self._flying[ticket] = progress
        ticket.on_step(lambda: self._stepped(ticket))
        ticket.on_done(lambda t: self._done(t, index=index, number=number, seed=seed, began=began))

    def _path(self, request: Request) -> NoisePath:
        key = (latent_shape(self.server.pipeline.bundle, request), int(request.has_image))
        if key not in self._paths:
            self._paths[key] = NoisePath(key[0], skip=key[1])
        return self._paths[key]

    # --- called by the server's threads ---

    def _stepped(self, ticket: Ticket) -> None:
        with self._lock:
            progress = self._flying.get(ticket)
            if progress is not None and not progress.stepped:
                progress.stepped = True
                self._lock.notify_all()

    def _done(self, ticket: Ticket, *, index: int, number: int, seed: int, began: float) -> None:
        error = ticket.error
        if error is None:
            latency_ms = 1e3 * (time.monotonic() - began)
            image = ticket.result().images[0]
            frame = Frame(image=image, index=index, input=number, seed=seed, latency_ms=latency_ms)
            self._made += 1
            self._meter.add(latency_ms)
            if self._outbox.put(frame):
                self._tell(frame)
        elif isinstance(error, ENDS):
            self._end(error)
        elif not (self._closed and isinstance(error, CancelledError)):
            self._fail(error if isinstance(error, FewstepError) else FewstepError(type(error).__name__))
        with self._lock:
            self._flying.pop(ticket, None)
            self._lock.notify_all()

    def _fail(self, error: FewstepError) -> None:
        with self._lock:
            self._failed += 1
        self._tell(error)

    def _end(self, error: FewstepError | None) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            flying = list(self._flying)
            self._lock.notify_all()
        for ticket in flying:
            ticket.cancel()
        self._outbox.end(error)
        if error is not None:
            self._tell(error)

    def _tell(self, event: Frame | FewstepError | int) -> None:
        if self._on_event is not None:
            self._on_event(event)
