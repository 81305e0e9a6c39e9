"""The key: every field changes it, and every difference is said in words."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from fewstep.engines import Profile, Span
from fewstep.engines.key import EngineKey, differences
from fewstep.errors import CorruptError

KEY = EngineKey(
    component="unet",
    backend="tensorrt-rtx",
    backend_version="1.7.1",
    graph_sha256="a" * 64,
    weights_sha256="b" * 64,
    dtype="float16",
    system="linux x86_64",
    device="any",
    capability="8.6 8.9",
    options={"optimization_level": 3, "auxiliary_streams": 0},
    profiles=(Profile.exact({"rows": 1, "height": 64}), Profile.exact({"rows": 2, "height": 64})),
)
CHANGES = {
    "component": ("vae_decoder", "component"),
    "backend": ("tensorrt", "backend"),
    "backend_version": ("1.8.0", "backend version"),
    "graph_sha256": ("c" * 64, "graph"),
    "weights_sha256": ("c" * 64, "weights"),
    "dtype": ("float32", "precision"),
    "system": ("win32 amd64", "operating system"),
    "device": ("NVIDIA H200", "device"),
    "capability": ("12.0", "compute capability"),
    "options": ({"optimization_level": 5, "auxiliary_streams": 0}, "build options"),
    "key_format": (3, "key format"),
}


def test_every_field_is_covered() -> None:
    assert {*CHANGES, "profiles"} == {f.name for f in fields(EngineKey)}


@pytest.mark.parametrize("field", list(CHANGES))
def test_a_changed_field_changes_the_digest_and_is_named(field: str) -> None:
    value, words = CHANGES[field]
    needed = replace(KEY, **{field: value})
    assert needed.digest != KEY.digest
    (found,) = differences(KEY, needed)
    assert found.field == field
    sentence = str(found)
    assert sentence.startswith(words)
    assert found.found in sentence
    assert f"(expected {found.expected})" in sentence


def test_profiles_fit_when_one_admits_the_sizes() -> None:
    needed = replace(KEY, profiles=())
    assert KEY.digest != needed.digest
    assert differences(KEY, needed) == ()
    assert differences(KEY, needed, dims={"rows": 2, "height": 64, "width": 64}) == ()
    (found,) = differences(KEY, needed, dims={"rows": 4, "height": 64})
    assert str(found) == "profiles height=64 rows=1; height=64 rows=2 (expected height=64 rows=4)"


def test_one_of_several_capabilities_is_enough() -> None:
    assert differences(KEY, replace(KEY, capability="8.9")) == ()
    assert [d.field for d in differences(KEY, replace(KEY, capability="8.9 12.0"))] == ["capability"]


def test_the_order_of_profiles_and_options_does_not_matter() -> None:
    again = replace(KEY, options=dict(reversed(KEY.options.items())), profiles=KEY.profiles[::-1])
    assert again.digest == KEY.digest
    assert replace(KEY, profiles=KEY.profiles[:1]).digest != KEY.digest


def test_a_key_survives_json() -> None:
    dynamic = replace(KEY, profiles=(Profile(spans={"rows": Span(minimum=1, optimum=2, maximum=8)}),))
    assert EngineKey.from_json(dynamic.to_json()) == dynamic
    for field in CHANGES:
        broken = dict(KEY.to_json())
        del broken[field]
        with pytest.raises(CorruptError, match=field):
            EngineKey.from_json(broken)
