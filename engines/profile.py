"""Profiles: the sizes for which an engine is built, one span for each named dimension."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..bundle import Bundle, TensorSpec, resolve_dimension
from ..errors import ArgumentError, UnknownNameError
from ..values import Reader

CHUNK = 77
MOST_RANK = 128
"""The largest rank of low-rank changes that profiles admit unless they are told another."""
MOST_WORDS = 1024
"""The most vectors of words that they admit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The sizes one dimension may take, and the one the engine is tuned for: `minimum <= optimum <= maximum`."""

    minimum: int
    optimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 0 < self.minimum <= self.optimum <= self.maximum:
            raise ArgumentError(
                f"the span {self.minimum}:{self.optimum}:{self.maximum} is not in order",
                expected="0 < minimum <= optimum <= maximum",
            )

    def __contains__(self, size: int) -> bool:
        return self.minimum <= size <= self.maximum

    def __str__(self) -> str:
        return str(self.optimum) if self.exact else f"{self.minimum}:{self.optimum}:{self.maximum}"

    @property
    def exact(self) -> bool:
        return self.minimum == self.maximum


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One span for each named dimension of a component."""

    spans: Mapping[str, Span]

    @classmethod
    def exact(cls, dims: Mapping[str, int]) -> Profile:
        """The profile that admits these dimensions and no others."""
        return cls(spans={n: Span(minimum=v, optimum=v, maximum=v) for n, v in sorted(dims.items())})

    @property
    def is_exact(self) -> bool:
        return all(span.exact for span in self.spans.values())

    @property
    def optimum(self) -> dict[str, int]:
        return {name: span.optimum for name, span in self.spans.items()}

    @property
    def order(self) -> tuple[tuple[str, tuple[int, int, int]], ...]:
        """What profiles are sorted by: dimensions by name, each by its numbers."""
        return tuple((name, (s.minimum, s.optimum, s.maximum)) for name, s in sorted(self.spans.items()))

    def admits(self, dims: Mapping[str, int]) -> bool:
        """Whether these dimensions fit; a dimension that the profile does not know is ignored."""
        return all(name in dims and dims[name] in span for name, span in self.spans.items())

    def shapes(self, spec: TensorSpec) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The smallest, best and largest shape of a tensor."""
        corners = ("minimum", "optimum", "maximum")
        low, best, high = (spec.resolve({n: getattr(s, c) for n, s in self.spans.items()}) for c in corners)
        return low, best, high

    def to_json(self) -> dict[str, list[int]]:
        return {name: [s.minimum, s.optimum, s.maximum] for name, s in sorted(self.spans.items())}

    @classmethod
    def from_json(cls, data: object) -> Profile:
        reading = Reader(place="a profile")
        spans = {}
        for name, span in reading.mapping("its spans", data).items():
            low, best, high = (reading.integer(name, n, 1) for n in reading.array(name, span, 3, 3))
            spans[name] = Span(minimum=low, optimum=best, maximum=high)
        return cls(spans=spans)

    def __str__(self) -> str:
        return " ".join(f"{name}={span}" for name, span in sorted(self.spans.items())) or "fixed shape"


def dimension_names(specs: Iterable[TensorSpec]) -> tuple[str, ...]:
    """The named dimensions of some tensors, sorted."""
    names = {d.partition("*")[0] for spec in specs for d in spec.shape if isinstance(d, str)}
    return tuple(sorted(names))


def check_dims(specs: Iterable[TensorSpec], dims: Mapping[str, int]) -> None:
    """Raise `ArgumentError` unless every named dimension has a size of at least 1."""
    for spec in specs:
        for dimension in spec.shape:
            size = resolve_dimension(dimension, dims, spec.name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ArgumentError(
                    f"dimension {dimension!r} of tensor {spec.name!r} is {size!r}", expected="an integer above 0"
                )


def select_profile(profiles: Sequence[Profile], dims: Mapping[str, int]) -> int | None:
    """The profile to use for these dimensions: an exact one before a dynamic one; `None` when none admits them."""
    fitting = [i for i, p in enumerate(profiles) if p.admits(dims)]
    return min(fitting, key=lambda i: not profiles[i].is_exact) if fitting else None


def change_spans() -> dict[str, Span]:
    """The spans of dimensions that only graphs with changes of weights have (`graph/low_rank.py`)."""
    return {
        "rank": Span(minimum=1, optimum=16, maximum=MOST_RANK),
        "words": Span(minimum=1, optimum=4, maximum=MOST_WORDS),
    }


def profiles_for(
    bundle: Bundle,
    *,
    sizes: Sequence[tuple[int, int]] = (),
    batches: Sequence[int] = (1,),
    tokens: Sequence[int] = (CHUNK,),
    guidance: bool | None = None,
    dynamic: Mapping[str, Span] | None = None,
) -> dict[str, tuple[Profile, ...]]:
    """The profiles of every component for these image sizes (width, height in pixels) and batch sizes.

    Exact by default: one profile for each size, batch and prompt length. `guidance` says whether the UNet gets two rows
    an image (`True`), one (`False`) or a profile for each (`None`). `dynamic` gives spans to dimensions by name
    (`rows`, `height` and `width` in latent cells, `tokens`, `prompts`, `batch`; of clips `frames`, and `chunk`: those
    that are decoded together); every profile takes them.
    """
    known = dimension_names(s for c in bundle.components.values() for s in (*c.inputs, *c.outputs))
    for name in dynamic or {}:
        if name not in known:
            raise UnknownNameError("dimension", name, known)
    cells = [_cells(bundle, size) for size in (sizes or [(bundle.defaults.width, bundle.defaults.height)])]
    for batch in batches:
        if batch < 1:
            raise ArgumentError(f"batch is {batch}", expected="an integer above 0")
    factors = {None: (1, 2), True: (2,), False: (1,)}[guidance]
    rows, frames = sorted({b * f for b in batches for f in factors}), max(1, bundle.latent.frames)
    sizings = [
        {
            **{"rows": r, "prompts": r, "batch": b, "height": h, "width": w, "tokens": t, "rank": 16, "words": 4},
            **{"frames": frames, "chunk": frames},
        }
        for h, w in cells
        for t in tokens
        for b in sorted(set(batches))
        for r in rows
    ]
    result = {}
    for name, component in bundle.components.items():
        named = dimension_names((*component.inputs, *component.outputs))
        unknown = [n for n in named if n not in sizings[0]]
        if unknown:
            raise ArgumentError(
                f"component {name!r} has the dimension {unknown[0]!r}", expected=f"one of {', '.join(sizings[0])}"
            )
        spans = {n: s for n, s in {**change_spans(), **(dynamic or {})}.items() if n in named}
        distinct = {}
        for dims in sizings:
            exact = Profile.exact({n: dims[n] for n in named})
            profile = Profile(spans={**exact.spans, **spans})
            distinct[str(profile)] = profile
        result[name] = tuple(distinct.values())
    return result


def _cells(bundle: Bundle, size: tuple[int, int]) -> tuple[int, int]:
    """Image size (width, height) in pixels to latent height and width in cells."""
    step = bundle.latent.unit
    width, height = size
    if width < step or height < step or width % step or height % step:
        raise ArgumentError(
            f"size {width}x{height} does not fit the model", expected=f"multiples of {step} for width and height"
        )
    return height // bundle.latent.factor, width // bundle.latent.factor
