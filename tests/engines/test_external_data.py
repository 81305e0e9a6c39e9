"""External data of a graph: nowhere but in the bundle's own weights, wherever in the graph a tensor hides.

Each bundle here states the digest of the graph that it has, as whoever writes a hostile one would.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from fewstep.bundle import Bundle, read_bundle, write_manifest
from fewstep.engines import Store, build_engines, open_engine
from fewstep.engines.gate.verify import verify_graph
from fewstep.engines.graph.external import check_external
from fewstep.engines.graph.onnx_bytes import block
from fewstep.errors import CorruptError, FewstepError, UnsafeFileError
from onnx import TensorProto, helper
from small_bundle import example, write_bundle
from test_build import DIMS, run

OWN = "unet.safetensors"


@pytest.fixture
def own(tmp_path: Path) -> Bundle:
    """A bundle, and beside its weights what a graph might be made to read."""
    bundle = write_bundle(tmp_path / "small")
    data = (bundle.folder / OWN).read_bytes()
    (tmp_path / "outside.bin").write_bytes(data)
    (bundle.folder / "link").symlink_to(tmp_path / "outside.bin")
    os.link(tmp_path / "outside.bin", bundle.folder / "hard")
    (bundle.folder / "copy.safetensors").write_bytes(data)
    return bundle


def load(bundle: Bundle) -> Any:
    return onnx.load(str(bundle.folder / "unet.onnx"), load_external_data=False)


def with_graph(bundle: Bundle, model: Any) -> Bundle:
    data = model.SerializeToString()
    (bundle.folder / "unet.onnx").write_bytes(data)
    unet = replace(bundle.components["unet"], graph_sha256=hashlib.sha256(data).hexdigest())
    changed = replace(bundle, components={**bundle.components, "unet": unet})
    write_manifest(changed)
    return read_bundle(bundle.folder)


def point(tensor: Any, **to: str | None) -> None:
    """Change where a tensor lies; `None` takes an entry away."""
    entries = {e.key: e.value for e in tensor.external_data} | to
    del tensor.external_data[:]
    for key, value in entries.items():
        if value is not None:
            tensor.external_data.add(key=key, value=value)


def external(model: Any) -> Any:
    return next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)


def refuse(bundle: Bundle, tmp_path: Path, error: type[FewstepError]) -> None:
    """Every way in refuses the bundle, for what its graph says."""
    store = Store(tmp_path / "engines")
    ways: list[Callable[[], object]] = [
        lambda: build_engines(bundle, backend="ort-cpu", components=["unet"], store=store, gate=False),
        lambda: open_engine(bundle, "unet", backend="ort-cpu", store=store),
        lambda: verify_graph(bundle, "unet", []),
    ]
    for way in ways:
        with pytest.raises(error, match="the graph's tensor"):
            way()
    assert list(store.entries()) == []


LOCATIONS = {
    "absolute": "{parent}/outside.bin",
    "absolute, its own": "{folder}/unet.safetensors",
    "a file of the system": "/etc/passwd",
    "a device": "/dev/zero",
    "upwards": "../outside.bin",
    "upwards and back": "../small/unet.safetensors",
    "through itself": "./unet.safetensors",
    "a link": "link",
    "a hard link": "hard",
    "another file": "copy.safetensors",
    "another component's": "vae_decoder.safetensors",
    "the folder": ".",
    "empty": "",
    "a null byte": "unet.safetensors\0.bin",
    "backslashes": "..\\outside.bin",
    "a stream of Windows": "unet.safetensors::$DATA",
    "a URL": "file:///etc/passwd",
    "memory": "*/_ORT_MEM_ADDR_/*",
    "none": None,
}


@pytest.mark.parametrize("case", LOCATIONS)
def test_another_place_than_the_bundles_weights_is_refused(own: Bundle, tmp_path: Path, case: str) -> None:
    model, to = load(own), LOCATIONS[case]
    point(external(model), location=to and to.format(parent=tmp_path, folder=own.folder))
    refuse(with_graph(own, model), tmp_path, UnsafeFileError)


RANGES = {
    **{f"offset {o}": {"offset": o} for o in ("-1", "x", "1e3", "0x10", " 64", "6_4", "٣", "", str(2**63), str(2**64))},
    "an offset at the end": {"offset": "{length}"},
    "one byte too far": {"offset": "{too_far}"},
    "no offset": {"offset": None},
    **{f"length {n}": {"length": n} for n in ("0", "-1", "1", "x", "99999999999", str(2**63))},
    "no length": {"length": None},
}


@pytest.mark.parametrize("case", RANGES)
def test_an_offset_or_a_length_that_is_none_is_refused(own: Bundle, tmp_path: Path, case: str) -> None:
    model, length = load(own), (own.folder / OWN).stat().st_size
    tensor = external(model)
    size = int(next(e.value for e in tensor.external_data if e.key == "length"))
    facts = {"length": length, "too_far": length - size + 1}
    point(tensor, **{k: v and v.format(**facts) for k, v in RANGES[case].items()})
    refuse(with_graph(own, model), tmp_path, CorruptError)


def test_a_shape_or_a_type_that_does_not_fit_its_length_is_refused(own: Bundle, tmp_path: Path) -> None:
    for change in ("dims", "huge", "negative", "type", "string"):
        model = load(own)
        tensor = external(model)
        if change == "type":
            tensor.data_type = TensorProto.DOUBLE
        elif change == "string":
            tensor.data_type = TensorProto.STRING
        else:
            tensor.dims[0] = {"dims": tensor.dims[0] + 1, "huge": 2**62, "negative": -tensor.dims[0]}[change]
        refuse(with_graph(own, model), tmp_path, CorruptError)


def test_an_entry_given_twice_is_refused(own: Bundle, tmp_path: Path) -> None:
    """Readers differ in which of two they take."""
    model = load(own)
    external(model).external_data.insert(0, onnx.StringStringEntryProto(key="location", value="/etc/passwd"))
    refuse(with_graph(own, model), tmp_path, UnsafeFileError)


def hiding_places(tensor: Any) -> Iterator[tuple[str, Callable[[Any], None]]]:
    """Wherever else than among the initialisers a model may have a tensor."""
    constant = helper.make_node("Constant", [], ["hidden"], value=tensor)
    inner = helper.make_graph(
        [constant], "inner", [], [helper.make_tensor_value_info("hidden", TensorProto.FLOAT, None)]
    )
    branch = helper.make_node("If", ["flag"], ["out_of_it"], then_branch=inner, else_branch=inner)
    owner = helper.make_graph([branch], "outer", [], [])
    several = onnx.AttributeProto(name="values", type=onnx.AttributeProto.TENSORS, tensors=[tensor])
    sparse = onnx.SparseTensorProto(values=tensor, dims=[4])
    of_sparse = helper.make_node("Constant", [], ["hidden"], sparse_value=sparse)
    yield "a node's attribute", lambda m: m.graph.node.append(constant)
    yield "a subgraph", lambda m: m.graph.node.append(branch)
    yield "a subgraph of a subgraph", lambda m: m.graph.node.append(helper.make_node("Loop", [], ["o"], body=owner))
    yield "one of several", lambda m: m.graph.node[0].attribute.append(several)
    yield "a sparse initialiser", lambda m: m.graph.sparse_initializer.append(sparse)
    yield "a sparse attribute", lambda m: m.graph.node.append(of_sparse)
    yield (
        "a function",
        lambda m: m.functions.append(
            helper.make_function("own", "f", [], ["hidden"], [constant], [helper.make_opsetid("", 20)])
        ),
    )
    yield (
        "a subgraph's initialiser",
        lambda m: m.graph.node.append(
            helper.make_node("Loop", [], ["o"], body=helper.make_graph([], "g", [], [], [tensor]))
        ),
    )


def test_a_tensor_is_found_wherever_it_hides(own: Bundle, tmp_path: Path) -> None:
    tensor = helper.make_tensor("hidden", TensorProto.FLOAT, [4], np.zeros(4, np.float32).tobytes(), raw=True)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    point(tensor, location="../outside.bin", offset="0", length="16")
    length, seen = (own.folder / OWN).stat().st_size, 0
    for where, hide in hiding_places(tensor):
        model = load(own)
        hide(model)
        with pytest.raises(UnsafeFileError, match=r"'hidden' lies in the file '\.\./outside\.bin'"):
            pytest.fail(f"{where}: {check_external(model.SerializeToString(), weights=OWN, length=length)}")
        seen += 1
    assert seen == 8
    refuse(with_graph(own, model), tmp_path, UnsafeFileError)


def test_links_in_place_of_the_weights(own: Bundle, tmp_path: Path, store: Store) -> None:
    """A link is refused; a hard link is a file like any other, and its bytes are the ones that were hashed or not."""
    expected = run(open_engine(own, "unet", backend="ort-cpu", store=store), example("unet", DIMS))
    path = own.folder / OWN
    path.unlink()
    os.link(tmp_path / "outside.bin", path)
    found = run(open_engine(own, "unet", backend="ort-cpu", store=store), example("unet", DIMS))
    np.testing.assert_array_equal(found, expected)
    changed = bytearray(path.read_bytes())
    changed[-1] ^= 1
    (tmp_path / "outside.bin").write_bytes(changed)
    with pytest.raises(CorruptError, match="SHA-256"):
        open_engine(own, "unet", backend="ort-cpu", store=store)
    path.unlink()
    path.symlink_to(tmp_path / "outside.bin")
    with pytest.raises(UnsafeFileError, match="is a link"):
        open_engine(own, "unet", backend="ort-cpu", store=store)


def test_any_bytes_are_read_or_refused(own: Bundle) -> None:
    data, length, draw = (own.folder / "unet.onnx").read_bytes(), (own.folder / OWN).stat().st_size, random.Random(3)
    check_external(data, weights=OWN, length=length)
    refused = 0
    for _ in range(1500):
        changed = bytearray(data[: draw.choice([len(data), draw.randrange(len(data))])])
        for _ in range(draw.randrange(4)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        try:
            check_external(bytes(changed), weights=OWN, length=length)
        except FewstepError:
            refused += 1
    assert 200 < refused < 1500
    nested = b""
    for _ in range(12):
        nested = block(1, block(5, block(6, nested)))  # a graph's node's attribute's graph
    with pytest.raises(CorruptError, match="deep"):
        check_external(block(7, nested), weights=OWN, length=length)
