"""Clips out: MP4 by PyAV, animated WebP and GIF by Pillow, or a folder of PNGs, with what made them."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import ArgumentError, MissingError, MissingExtraError
from ...places import put_in_place, staging_folder, writing
from ..arrays import UInt8
from .images import pillow_images, save_picture
from .texts import JSON_KEY

CODEC, PIXELS, QUALITY = "libx264", "yuv420p", "18"
"""What every player takes, and x264's constant rate factor at which a loss is hard to see."""
GIF_UNIT_MS = 10
_FRAME = re.compile(r"\d{4,}\.png")


def check_clip_output(path: str | os.PathLike[str]) -> Path:
    """Where a clip is to go, if one can be written there; asked before it is made."""
    target, text = Path(path), os.fspath(path)
    if text == "-":
        raise ArgumentError("the output is '-'", expected="a file's name: no clip goes to standard output")
    if target.suffix.lower() not in {"", *WRITERS}:
        raise ArgumentError(
            f"the output is {target.name!r}",
            expected=f"a name that ends in {', '.join(WRITERS)}, or one without an ending for a folder of PNGs",
        )
    if not text or (target.suffix and target.is_dir()) or (not target.suffix and target.is_file()):
        raise ArgumentError(f"the output is {text!r}", expected="the name of a new file, or of a folder of PNGs")
    if not target.suffix:
        _check_folder(target)
    if not target.parent.is_dir():
        raise MissingError(f"no folder {str(target.parent)!r} to write the clip into", remedy="Make it first.")
    if target.suffix.lower() == ".mp4":
        open_av()
    return target


def _check_folder(folder: Path) -> None:
    """`ArgumentError` for one that frames cannot take the place of."""
    others = [p.name for p in folder.iterdir() if not _FRAME.fullmatch(p.name)] if folder.is_dir() else []
    if others:
        raise ArgumentError(
            f"the folder {str(folder)!r} holds {others[0][:80]!r}",
            expected="a new folder, or one of an earlier clip's frames alone, which are replaced",
        )


def open_av() -> Any:
    """PyAV; `MissingExtraError` where it is not installed."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise MissingExtraError("av", "video", purpose="Writing an MP4 (.webp, .gif and a folder need none)") from error
    return av


def save_clips(
    path: str | os.PathLike[str], clips: UInt8, fps: int, parameters: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Write clips uint8 [B, F, H, W, 3]; of several each gets its number before the suffix. Returns the names."""
    target = check_clip_output(path)
    stem, suffix = str(target.with_suffix("")), target.suffix
    names = [f"{stem}{suffix}"] if len(clips) == 1 else [f"{stem}-{i}{suffix}" for i in range(len(clips))]
    for name, clip, made in zip(names, clips, parameters, strict=True):
        if not suffix:
            _write_folder(Path(name), clip, made)
            continue
        whole = Path(name)
        part = whole.with_name(f".{whole.name}.{os.getpid()}.part")
        try:
            with writing(f"the clip {whole.name!r}", whole.absolute().parent):
                WRITERS[suffix.lower()](part, clip, fps, made)
                part.replace(whole)
        finally:
            part.unlink(missing_ok=True)
    return names


def _write_folder(folder: Path, clip: UInt8, parameters: Mapping[str, Any]) -> None:
    """All of a clip's frames or none, in the place of an earlier clip's, which may have been longer."""
    _check_folder(folder)
    with staging_folder(folder.absolute()) as staging:
        for i, frame in enumerate(clip):
            save_picture(staging / f"{i:04d}.png", frame, parameters)
        staging.chmod(0o755)
        put_in_place(staging, folder.absolute())


def _write_mp4(path: Path, clip: UInt8, fps: int, parameters: Mapping[str, Any]) -> None:
    """H.264; a frame of odd width or height repeats its edge, since colours are kept by two pixels."""
    av = open_av()
    height, width = (side % 2 for side in clip.shape[1:3])
    even = np.pad(clip, ((0, 0), (0, height), (0, width), (0, 0)), mode="edge")
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart+use_metadata_tags"}) as container:
        container.metadata["comment"] = json.dumps(dict(parameters), ensure_ascii=False)
        stream = container.add_stream(CODEC, rate=Fraction(fps), options={"crf": QUALITY})
        stream.height, stream.width, stream.pix_fmt = *even.shape[1:3], PIXELS
        for frame in even:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _write_webp(path: Path, clip: UInt8, fps: int, parameters: Mapping[str, Any]) -> None:
    from PIL import Image as pillow

    exif = pillow.Exif()
    exif[0x9286] = json.dumps({JSON_KEY: dict(parameters)}, ensure_ascii=False)  # UserComment
    first, *others = pillow_images(clip)
    shared: dict[str, Any] = {"save_all": True, "append_images": others, "loop": 0, "quality": 90, "exif": exif}
    written = io.BytesIO()  # see `save_picture`
    first.save(written, format="WEBP", duration=_durations(len(clip), fps, 1), **shared)
    path.write_bytes(written.getvalue())


def _write_gif(path: Path, clip: UInt8, fps: int, parameters: Mapping[str, Any]) -> None:
    first, *others = pillow_images(clip)
    comment = json.dumps({JSON_KEY: dict(parameters)}, ensure_ascii=True).encode()
    shared: dict[str, Any] = {"save_all": True, "append_images": others, "loop": 0, "comment": comment}
    written = io.BytesIO()  # see `save_picture`
    first.save(written, format="GIF", duration=_durations(len(clip), fps, GIF_UNIT_MS), **shared)
    path.write_bytes(written.getvalue())


def _durations(frames: int, fps: int, unit_ms: int) -> list[int]:
    """Milliseconds that each frame is shown, in whole units, none of them lost over the clip."""
    ends = [round(1000 * (i + 1) / (fps * unit_ms)) for i in range(frames)]
    starts = [0, *ends[:-1]]
    return [max(1, end - start) * unit_ms for start, end in zip(starts, ends, strict=True)]


WRITERS: dict[str, Callable[[Path, UInt8, int, Mapping[str, Any]], None]] = {
    ".mp4": _write_mp4,
    ".webp": _write_webp,
    ".gif": _write_gif,
}
