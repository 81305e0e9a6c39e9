"""A disk that an export fills: told as such, with what it takes, and nothing left of what did not fit."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from fewstep.bundle import read_bundle
from fewstep.cli import main
from fewstep.errors import WriteError
from fewstep.export import export_bundle
from fewstep.export.embedded import embedded_checkpoint
from fewstep.export.trace.graphs import find_graph, keep_graph
from small_disk import PAGE, small_disk


def test_a_full_disk_is_told_as_one_however_much_of_the_bundle_it_takes(tmp_path: Path) -> None:
    """From none of it, which is seen before anything is written, to all but the manifest, which is not."""
    checkpoint = embedded_checkpoint("student")
    whole = export_bundle(checkpoint, tmp_path / "whole", gate=False)
    sizes = [p.stat().st_size for p in whole.folder.iterdir() if p.suffix in {".onnx", ".safetensors"}]
    pages = sum(-(-p.stat().st_size // PAGE) for p in whole.folder.iterdir())
    refused = []
    with small_disk(tmp_path / "disk") as disk:
        for fewer in (pages - 1, pages // 2, 60, 20, 8, 3, 1, -8):
            disk.resize((pages - fewer) * PAGE)
            try:
                export_bundle(checkpoint, disk.path / "b", gate=False)
            except WriteError as error:
                refused.append(str(error))
                assert list(disk.path.iterdir()) == []
        assert read_bundle(disk.path / "b").to_json() | {"name": ""} == whole.to_json() | {"name": ""}
    assert len(refused) == 7
    words = r"the bundle cannot be written to '.*disk.*': the disk is full, .*B are free"
    assert all(re.match(words, e) for e in refused)
    stated = [float(found[1]) for e in refused if (found := re.search(r"room for about ([\d.]+) MB", e))]
    assert stated == pytest.approx([sum(sizes) / 1e6] * 7, rel=0.02)


def test_a_full_disk_is_exit_code_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with small_disk(tmp_path / "disk") as disk:
        source = str(embedded_checkpoint("student"))
        assert main(["export", source, str(disk.path / "b"), "--no-gate", "--json"]) == 3
    error = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["error"]
    assert error["type"] == "WriteError"
    assert "the disk is full" in error["found"]


def test_a_traced_graph_that_cannot_be_kept_is_told_of(tmp_path: Path) -> None:
    bundle = export_bundle(embedded_checkpoint("student"), tmp_path / "b", gate=False)
    graph = find_graph(bundle.component("unet").graph_key)
    assert graph is not None
    with small_disk(tmp_path / "disk") as disk:
        disk.resize(PAGE)
        with pytest.raises(WriteError, match=r"a traced graph cannot be written.*the disk is full.*room for about"):
            keep_graph(graph, disk.path)
        assert list(disk.path.iterdir()) == []
