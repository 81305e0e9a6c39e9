"""Where ONNX Runtime runs what: read from the session itself, and refused where it computes elsewhere.

No GPU is used: sessions of the CPU's provider are looked at as if another had been asked for.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from fewstep.engines import RunOptions
from fewstep.engines.backends.ort import CPU, check_placement, open_session
from fewstep.engines.backends.ort_cuda import COMPUTING, CUDA
from fewstep.errors import MismatchError
from fewstep.export.embedded import embedded_bundle

WATCHED = replace(CPU, computing=COMPUTING)
"""The CPU's provider, held to what the GPU's is held to."""


@pytest.mark.parametrize("component", ["text_encoder", "unet", "vae_decoder", "vae_encoder"])
@pytest.mark.parametrize("optimization", ["disabled", "all"])
def test_what_a_component_computes_with_is_looked_for(component: str, optimization: str) -> None:
    bundle, _ = embedded_bundle("student")
    part = bundle.component(component)
    session = open_session(bundle.path(part.graph), provider=WATCHED, run=RunOptions(), optimization=optimization)
    assert check_placement(session, WATCHED) == {}, "all of it is where it was asked to be"
    with pytest.raises(MismatchError, match=r"ONNX Runtime runs .*\d+ (Attention|Conv|MatMul).* on another provider"):
        check_placement(session, CUDA)


def test_a_version_that_cannot_tell_is_refused_and_others_are_not_asked() -> None:
    silent = SimpleNamespace()
    with pytest.raises(MismatchError, match=r"does not tell where it runs what; expected 1\.27 or newer"):
        check_placement(silent, CUDA)
    assert check_placement(silent, CPU) == {}


def test_shape_arithmetic_may_be_elsewhere() -> None:
    node = SimpleNamespace(op_type="Shape", name="s", domain="")
    session = SimpleNamespace(
        get_provider_graph_assignment_info=lambda: [
            SimpleNamespace(ep_name="CPUExecutionProvider", get_nodes=lambda: [node, node]),
            SimpleNamespace(ep_name=CUDA.name, get_nodes=lambda: [SimpleNamespace(op_type="Conv")]),
        ]
    )
    assert check_placement(session, CUDA) == {"Shape": 2}
