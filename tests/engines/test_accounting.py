"""Fusion accounting: operators counted without onnx, as onnx counts them, and lost fusions that are noticed."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace

import onnx
import pytest
from fewstep.bundle import Bundle
from fewstep.engines import BuildOptions, Store, build_engines
from fewstep.engines.graph.accounting import FUSED_ON_CPU, check_fusion, count_operators
from fewstep.errors import CorruptError, MismatchError
from onnx import helper
from small_bundle import SPECS


@pytest.mark.parametrize("component", list(SPECS))
def test_operators_are_counted_as_onnx_counts_them(bundle: Bundle, component: str) -> None:
    data = bundle.path(f"{component}.onnx").read_bytes()
    expected = Counter(n.op_type for n in onnx.load_model_from_string(data).graph.node)
    assert count_operators(data) == expected == Counter(bundle.component(component).operators)


def test_subgraphs_are_counted_too() -> None:
    def branch(name: str) -> onnx.GraphProto:
        out = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
        return helper.make_graph([helper.make_node("Exp", ["x"], ["y"])], name, [], [out])

    node = helper.make_node("If", ["c"], ["z"], then_branch=branch("a"), else_branch=branch("b"))
    model = helper.make_model(helper.make_graph([node], "g", [], []))
    assert count_operators(model.SerializeToString()) == {"If": 1, "Exp": 2}


@pytest.mark.parametrize("cut", [1, 7, 50, 333])
def test_a_cut_model_is_refused(bundle: Bundle, cut: int) -> None:
    data = bundle.path("unet.onnx").read_bytes()
    with pytest.raises(CorruptError, match="in the middle of"):
        count_operators(data[:-cut])


def test_a_field_of_no_known_type_is_refused() -> None:
    with pytest.raises(CorruptError, match="wire type 7"):
        count_operators(b"\x0f")
    with pytest.raises(CorruptError, match="middle of a number"):
        count_operators(b"\xff" * 20)


def test_everything_that_can_be_fused_comes_through_onnx_runtime_fused(bundle: Bundle, store: Store) -> None:
    facts = build_engines(bundle, backend="ort-cpu", components=["unet"], store=store)["unet"].entry.facts
    assert facts["fused"] == {
        "Attention": 1,
        "GroupNormalization": 1,
        "LayerNormalization": 0,
        "Gelu": 0,
        "Sigmoid": 1,
    }
    assert facts["operators"]["QuickGelu"] == 1


@pytest.mark.parametrize("operator", list(FUSED_ON_CPU))
def test_a_build_for_the_cpu_fails_when_a_fusion_is_lost(bundle: Bundle, store: Store, operator: str) -> None:
    part = bundle.component("unet")
    more = replace(part, operators={**part.operators, operator: part.operators.get(operator, 0) + 1})
    stated = replace(bundle, components={**bundle.components, "unet": more})
    with pytest.raises(MismatchError, match=f"of . {operator} operators of 'unet'"):
        build_engines(stated, backend="ort-cpu", components=["unet"], store=store)
    assert not list(store.entries("unet"))
    plain = BuildOptions(optimization="basic")  # nothing is fused then, as asked
    assert build_engines(stated, backend="ort-cpu", components=["unet"], store=store, options=plain)


def test_a_lost_fusion_is_an_error_or_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(MismatchError, match="15 of 16 Attention operators of 'unet'"):
        check_fusion("unet", {"Attention": 16}, {"Attention": 15}, strict=True)
    assert check_fusion("unet", {"Attention": 16}, {"Attention": 6, "MultiHeadAttention": 10}, strict=True) == {
        "Attention": 16
    }
    with caplog.at_level(logging.WARNING):
        check_fusion("unet", {"Attention": 16}, {}, strict=False)
    assert "0 of 16 Attention" in caplog.text


def test_tensorrt_is_held_to_the_manifests_count(bundle: Bundle, store: Store) -> None:
    pytest.importorskip("tensorrt_rtx")
    more = replace(bundle.component("unet"), operators={"Attention": 2})
    stated = replace(bundle, components={**bundle.components, "unet": more})
    options = BuildOptions(compute_capabilities=("8.9",))
    with pytest.raises(MismatchError, match="1 of 2 Attention"):
        build_engines(stated, backend="tensorrt-rtx", components=["unet"], store=store, options=options)
