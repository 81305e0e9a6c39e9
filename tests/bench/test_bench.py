"""`fewstep bench` from the command line, on the embedded model, with a peer that is not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fewstep.bench.workers import CONTENDERS, OPENVINO, ContenderWorker, contender
from fewstep.cli import main
from fewstep.commands.bench import PEERS
from fewstep.errors import FewstepError


def test_bench_measures_fewstep_and_names_a_peer_that_cannot_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE_DIR", str(tmp_path / "cache"))
    output, picture = tmp_path / "figures.json", tmp_path / "figures.png"
    arguments = ["bench", "student", "--against", "diffusers", "--environments", str(tmp_path / "none")]
    arguments += ["--steps", "1,2", "--repeat", "3", "--warm-up", "1", "--cold", "1", "--threads", "1"]
    assert main([*arguments, "--output", str(output), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "diffusers            cannot run: the peer 'diffusers' has no virtual environment" in printed
    report = json.loads(output.read_text())
    ours = report["contenders"]["fewstep"]
    assert ours["whole"]["2"]["n"] == len(ours["samples_ms"]["2"]) == 3
    assert ours["stages"]["2"]["each evaluation"]["n"] == 6
    assert ours["stages"]["2"]["each evaluation"]["p50"] < ours["whole"]["2"]["p50"]
    assert ours["cold_start"]["p50"] > ours["whole"]["1"]["p50"]
    assert ours["cold_start_unbuilt"]["n"] == ours["cold_start"]["n"] == 1
    assert ours["peak_mb"] > 30
    assert report["machine"]["threads"] == 1
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_one_evaluation_of_the_unet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE_DIR", str(tmp_path / "cache"))
    output = tmp_path / "figures.json"
    assert main(["bench", "student", "--unet", "--repeat", "2", "--threads", "1", "--output", str(output)]) == 0
    assert json.loads(output.read_text())["contenders"]["fewstep"]["whole"]["1"]["n"] == 2


def test_each_peer_has_the_precisions_that_are_asked_for_or_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE_DIR", str(tmp_path / "cache"))
    output = tmp_path / "figures.json"
    asked = ["--against", "diffusers,optimum,nncf", "--precision", "float32,bfloat16", "--repeat", "1"]
    arguments = ["bench", "student", "--unet", "--threads", "1", *asked, "--environments", str(tmp_path / "none")]
    assert main([*arguments, "--output", str(output)]) == 0
    contenders = set(json.loads(output.read_text())["contenders"])
    assert contenders == {"fewstep", "diffusers", "diffusers bfloat16", "optimum", "nncf int8"}


def test_the_peers_that_are_offered_are_those_that_there_are() -> None:
    assert {"fewstep", OPENVINO, *PEERS} == set(CONTENDERS)


def test_a_budget_that_the_bundle_has_nothing_within_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "student", "--budget", "30dB"]) == 3
    assert "fewstep quantize" in capsys.readouterr().err


def test_an_unknown_peer_is_a_missing_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "student", "--against", "difusers"]) != 0
    assert "diffusers" in capsys.readouterr().err


def test_a_worker_says_what_went_wrong_and_a_dead_one_is_noticed(tmp_path: Path) -> None:
    worker = ContenderWorker(contender("fewstep"), environments=tmp_path, threads=1)
    try:
        with pytest.raises(FewstepError, match=r"fewstep: .*bundle"):
            worker.ask(
                do="load", bundle=str(tmp_path / "nothing"), size=[64, 64], batch=1, threads=1, precision="float32"
            )
        worker._process.kill()
        with pytest.raises(FewstepError, match="ended: exit code -9"):
            worker.ask(do="load")
    finally:
        worker.close()
