"""Pictures at every door, against diffusers' `load_image`: all orientations, formats and modes."""

from __future__ import annotations

import contextlib
import io
import itertools
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
from diffusers import StableDiffusionImg2ImgPipeline
from diffusers.utils import load_image
from fewstep.errors import ArgumentError, CorruptError, FewstepError
from fewstep.runtime.diffusers_adapter import StableDiffusionImg2ImgPipeline as OurImg2Img
from fewstep.runtime.pictures.inpaint import open_mask
from fewstep.runtime.pictures.reading import ORIENTATION, open_alpha, open_image
from fewstep.serving.http.bodies import open_clear_mask, open_picture
from fewstep.serving.live.pictures import read_picture
from PIL import Image, PngImagePlugin

SIZE = (24, 16)
FORMATS = ("PNG", "JPEG", "WEBP")
ORIENTATIONS = tuple(range(1, 9))


def photo(size: tuple[int, int] = SIZE) -> Image.Image:
    """No two corners alike."""
    width, height = size
    y, x = np.mgrid[:height, :width]
    made = np.stack([255 * x / (width - 1), 255 * y / (height - 1), 128 + 90 * np.sin(x + 2.0 * y)], -1)
    return Image.fromarray(made.astype(np.uint8))


def packed(image: Image.Image, kind: str, orientation: Any = 1, **more: Any) -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    out = io.BytesIO()
    image.save(out, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}), **more)
    return out.getvalue()


def doors(data: bytes, path: Path) -> dict[str, np.ndarray]:
    """What each door makes of a picture, given the size that an upright one has."""
    path.write_bytes(data)
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    upright = load_image(str(path)).size
    return {
        "file": np.asarray(open_image(path)),
        "bytes": np.asarray(open_image(data)),
        "lazy Pillow": np.asarray(open_image(Image.open(io.BytesIO(data)))),
        "loaded Pillow": np.asarray(open_image(loaded)),
        "HTTP": np.asarray(open_picture(data, 10_000)),
        "live bytes": read_picture(data, upright),
        "live Pillow": read_picture(Image.open(io.BytesIO(data)), upright),
        "live after HTTP": read_picture(open_picture(data, 10_000), upright),
        "mask file": np.asarray(open_mask(path)),
        "mask Pillow": np.asarray(open_mask(loaded).convert("RGB")),
    }


@pytest.mark.parametrize(("kind", "orientation"), itertools.product(FORMATS, ORIENTATIONS))
def test_every_door_turns_a_picture_as_diffusers_does(kind: str, orientation: int, tmp_path: Path) -> None:
    path = tmp_path / "photo"
    data = packed(photo(), kind, orientation)
    found = doors(data, path)
    expected = np.asarray(load_image(str(path)))
    assert (expected.shape[0] > expected.shape[1]) == (orientation >= 5)
    for door, pixels in found.items():
        np.testing.assert_array_equal(pixels, expected, err_msg=door)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_of_a_file_is_diffusers_colours(mode: str, tmp_path: Path) -> None:
    image = photo()
    if mode in {"LA", "RGBA"}:
        image.putalpha(Image.fromarray(np.linspace(0, 255, 24 * 16).reshape(16, 24).astype(np.uint8)))
    image = image.convert(mode)
    more = {"transparency": 3} if mode == "P" else {}
    kind = "JPEG" if mode == "CMYK" else "PNG"
    for orientation in (1, 6):
        found = doors(packed(image, kind, orientation, **more), tmp_path / "picture")
        expected = np.asarray(load_image(str(tmp_path / "picture")))
        for door, pixels in found.items():
            np.testing.assert_array_equal(pixels, expected, err_msg=door)


def test_what_lies_under_alpha_is_what_is_seen() -> None:
    under = photo()
    clear = under.copy()
    clear.putalpha(0)
    for kind in ("PNG", "WEBP"):
        data = packed(clear, kind, **({"exact": True} if kind == "WEBP" else {}))
        np.testing.assert_array_equal(np.asarray(open_image(data)), np.asarray(under))


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_grey_of_16_bits_is_read_as_8(orientation: int, tmp_path: Path) -> None:
    wide = np.arange(24 * 16, dtype=np.uint16).reshape(16, 24) * np.uint16(170) + np.uint16(13)
    exact = Image.fromarray(np.round(wide / 257.0).astype(np.uint8))
    data = packed(Image.fromarray(wide), "PNG", orientation)
    found = doors(data, tmp_path / "wide.png") if orientation < 5 else {"file": np.asarray(open_image(data))}
    expected = np.asarray(load_image(Image.open(io.BytesIO(packed(exact, "PNG", orientation)))))
    for door, pixels in found.items():
        np.testing.assert_array_equal(pixels, expected, err_msg=door)
    swapped = Image.frombytes("I;16B", (24, 16), wide.astype(">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(open_image(swapped)), np.asarray(exact.convert("RGB")))


def test_pillow_images_of_other_modes() -> None:
    rgb = photo()
    for mode in ("I", "YCbCr", "HSV", "LAB", "RGBX", "RGBa", "PA", "La"):
        made = rgb.convert("LA").convert("La") if mode == "La" else None
        if mode == "LAB":
            made = Image.frombytes("LAB", rgb.size, rgb.tobytes())
        if mode == "RGBa":
            made = rgb.convert("RGBA").convert("RGBa")
        if mode == "PA":
            made = rgb.convert("LA").convert("PA")
        made = rgb.convert(mode) if made is None else made
        found = open_image(made)
        assert (found.mode, found.size) == ("RGB", rgb.size), mode
        plain = {"La": rgb.convert("L"), "I": rgb.convert("L"), "RGBa": rgb, "RGBX": rgb}.get(mode, made)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(plain.convert("RGB")), err_msg=mode)
    for bad in (Image.new("F", (4, 4), 0.5), Image.new("I", (4, 4), 256), Image.new("I", (4, 4), -1)):
        with pytest.raises(ArgumentError, match="mode"):
            open_image(bad)


def test_an_orientation_in_xmp_counts_where_exif_has_none() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    out = io.BytesIO()
    photo().save(out, "JPEG", xmp=xmp)
    upright = np.asarray(load_image(Image.open(io.BytesIO(out.getvalue()))))
    assert upright.shape == (24, 16, 3)
    np.testing.assert_array_equal(np.asarray(open_image(out.getvalue())), upright)


def test_unreadable_orientations_leave_a_picture_as_it_lies() -> None:
    plain = np.asarray(photo())
    for stated in (0, 9, 65535):
        np.testing.assert_array_equal(np.asarray(open_image(packed(photo(), "PNG", stated))), plain)
    rng = np.random.default_rng(3)
    whole = packed(photo(), "PNG", 6)
    begin = whole.index(b"eXIf") + 4
    length = int.from_bytes(whole[begin - 8 : begin - 4], "big")
    for _ in range(200):
        chunk = bytearray(whole[begin : begin + length])
        chunk[rng.integers(length)] = rng.integers(256)
        info = PngImagePlugin.PngInfo()
        info.add(b"eXIf", bytes(chunk))
        out = io.BytesIO()
        photo().save(out, "PNG", pnginfo=info)
        assert open_image(out.getvalue()).mode == "RGB"


def test_damage_is_told_by_type_at_every_door(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    whole = [packed(photo(), kind, 6) for kind in FORMATS] + [packed(photo().convert("RGBA"), "PNG", 8)]
    for _ in range(300):
        data = bytearray(whole[rng.integers(len(whole))])
        for at in rng.integers(len(data), size=rng.integers(1, 4)):
            data[at] = rng.integers(256)
        for read in (open_image, open_alpha):
            with contextlib.suppress(FewstepError):
                read(bytes(data), most_pixels=10_000)
    cut = Image.open(io.BytesIO(packed(photo((200, 200)), "PNG")[:800]))
    with pytest.raises(CorruptError, match="decoded"):
        open_image(cut)


def test_a_turned_picture_gives_diffusers_picture(sd1_bundle: Any, tiny_sd1: Path, tmp_path: Path) -> None:
    """Of a file, and through the adapter of a Pillow image, which diffusers' pipelines take as it lies."""
    import torch

    path = tmp_path / "photo.jpg"
    path.write_bytes(packed(photo((32, 32)), "JPEG", 6))
    theirs = StableDiffusionImg2ImgPipeline.from_pretrained(tiny_sd1, safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    asked = {"prompt": "a red circle", "num_inference_steps": 4, "strength": 0.5, "guidance_scale": 2.0}
    ours = fewstep.load(sd1_bundle)

    def expected(image: Image.Image) -> np.ndarray:
        generator = torch.Generator().manual_seed(7)
        return theirs(image=image, generator=generator, output_type="np", **asked).images[0]

    def decibels(found: np.ndarray, image: Image.Image) -> float:
        whole = np.round(255.0 * expected(image)).astype(np.float64)
        return float(10 * np.log10(255.0**2 / max(np.mean((found - whole) ** 2), 1e-12)))

    turned, lying = load_image(str(path)), Image.open(path)
    assert decibels(np.round(255.0 * expected(turned)), lying) < 50, "the turn shows"
    own = ours("a red circle", image=path, strength=0.5, steps=4, guidance=2.0, seed=7, compat="diffusers")
    assert decibels(own.images[0].astype(np.float64), turned) >= 75
    adapted = OurImg2Img(ours)(image=lying, generator=torch.Generator().manual_seed(7), output_type="np", **asked)
    assert decibels(np.round(255.0 * adapted.images[0]), lying) >= 75


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_a_clear_mask_is_white_where_nothing_is_to_be_kept(orientation: int) -> None:
    alpha = np.full((16, 24), 255, np.uint8)
    alpha[2:9, 3:5], alpha[10:, :] = 0, 1
    mask = photo()
    mask.putalpha(Image.fromarray(alpha))
    upright = load_image(Image.open(io.BytesIO(packed(Image.fromarray(alpha), "PNG", orientation)))).convert("L")
    found = open_clear_mask(packed(mask, "PNG", orientation), 10_000, upright.size)
    np.testing.assert_array_equal(np.asarray(found), np.where(np.asarray(upright) == 0, 255, 0))


def test_transparency_of_any_kind_is_found() -> None:
    base = photo()
    palette = base.quantize(8)
    cases = {
        "RGBA": (base.convert("RGBA"), {}),
        "LA": (base.convert("LA"), {}),
        "P": (palette, {"transparency": 2}),
        "L": (base.convert("L"), {"transparency": 90}),
        "RGB": (base, {"transparency": base.getpixel((3, 4))}),
        "I;16": (Image.fromarray(np.arange(384, dtype=np.uint16).reshape(16, 24)), {"transparency": 300}),
    }
    for mode, (image, more) in cases.items():
        found = open_alpha(packed(image, "PNG", **more))
        assert found is not None, mode
        if more:
            clear = image.getpixel((3, 4)) if mode == "RGB" else more["transparency"]
            expected = np.asarray([p == clear for p in image.get_flattened_data()]).reshape(16, 24)
            np.testing.assert_array_equal(np.asarray(found) == 0, expected, err_msg=mode)
            assert expected.any(), mode
    for kind in FORMATS:
        assert open_alpha(packed(base, kind)) is None
