"""Prompts that change on the way: the web UI's published examples, and every device against arrays put in by hand."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
from device_models import SDXL, SHAPE, Image, engine, program
from fewstep.cli import main
from fewstep.engines import Engine
from fewstep.errors import ArgumentError, UnsupportedError
from fewstep.runtime import Pipeline
from fewstep.runtime.conditioning import Retold
from fewstep.runtime.device.base import Sampling, Slots
from fewstep.runtime.device.cuda_graphs import GraphCache, TapeRecorder
from fewstep.runtime.device.numpy_slots import NumpySlots
from fewstep.runtime.device.torch_slots import TorchSlots
from fewstep.runtime.prompts.editing import DEEPEST, MOST_TEXTS, prompt_runs, texts_by_evaluation
from fewstep.runtime.prompts.syntax import Prompt

TURNS = [(i + 1, ("a", "(b:1.1)")[i % 2]) for i in range(10)]
PUBLISHED = {
    "test": [(10, "test")],
    "a [b:3]": [(3, "a "), (10, "a b")],
    "a [b: 3]": [(3, "a "), (10, "a b")],
    "a [[[b]]:2]": [(2, "a "), (10, "a [[b]]")],
    "[(a:2):3]": [(3, ""), (10, "(a:2)")],
    "a [b : c : 1] d": [(1, "a b  d"), (10, "a  c  d")],
    "a[b:[c:d:2]:1]e": [(1, "abe"), (2, "ace"), (10, "ade")],
    "a [unbalanced": [(10, "a [unbalanced")],
    "a [b:.5] c": [(5, "a  c"), (10, "a b c")],
    "((a][:b:c [d:3]": [(3, "((a][:b:c "), (10, "((a][:b:c d")],
    "[a|(b:1.1)]": TURNS,
    "[fe|]male": [(i + 1, ("female", "male")[i % 2]) for i in range(10)],
    "[fe|||]male": [(i + 1, ("female", "male", "male", "male")[i % 4]) for i in range(10)],
}
"""The examples in the web UI's own parser, of 10 steps: which text lasts until which."""
BLUE = "on a blue background"


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipeline]:
    with fewstep.load("base", threads=1) as loaded:
        yield loaded


@pytest.mark.parametrize("text", PUBLISHED)
def test_the_published_examples(text: str) -> None:
    """Evaluations are numbered from 0, and a text lasts until the one of its number."""
    until = [next(t for end, t in PUBLISHED[text] if i <= end) for i in range(10)]
    assert texts_by_evaluation(text, 10, 10) == until


@pytest.mark.parametrize(
    ("text", "at", "expected"),
    [
        ("a [b:c:2.0] d", 9, "a b d"),  # a number with a point is a share, at most all
        ("a [b:c:0] d", 0, "a c d"),
        ("[a:b:c:3]", 5, "[a:b:c:3]"),
        ("[x [a:b:c:3] y:.5]", 5, "[x [a:b:c:3] y:.5]"),
        ("[x:y] z", 5, "[x:y] z"),
        (r"a \[b:c:3\] d", 5, r"a \[b:c:3\] d"),
        ("(x [y:z:4]:1.2)", 9, "(x z:1.2)"),
        ("[a (b:c:.5]", 9, "[a (b:c:.5]"),
        ("a | b [c:d:1]", 9, "a | b d"),
    ],
)
def test_what_is_an_edit_and_what_is_not(text: str, at: int, expected: str) -> None:
    assert texts_by_evaluation(text, 10, 10)[at] == expected


def test_brackets_by_the_thousand_are_read_and_depth_is_limited() -> None:
    for text in ("[" * 20_000, "[a:" * 6_000, "(" * 9_000 + ")" * 9_000, "[a|" * 30 + "]" * 30):
        texts_by_evaluation(text, 10, 10)
    with pytest.raises(ArgumentError, match=f"at most {DEEPEST}"):
        texts_by_evaluation("[" * 40 + "a" + ":1]" * 40, 10, 10)
    many = " ".join(f"[{'|'.join(letters)}]" for letters in ("ab", "cde", "fghij", "klmnopq"))
    with pytest.raises(ArgumentError, match=f"at most {MOST_TEXTS}"):
        prompt_runs(Prompt(text=many, syntax="a1111"), 500, 500)


def test_runs_begin_where_either_encoders_text_changes() -> None:
    prompt = Prompt(text="[a:b:2]", text_2="[c:d:4]", syntax="a1111")
    runs = [(first, p.text, p.text_2) for first, p in prompt_runs(prompt, 8, 8)]
    assert runs == [(0, "a", "c"), (3, "b", "c"), (5, "b", "d")]
    assert prompt_runs(replace(prompt, syntax="plain"), 8, 8) == [(0, replace(prompt, syntax="plain"))]


def by_hand(pipe: Pipeline, prompts: list[str], negatives: list[str], **call: Any) -> np.ndarray:
    """The picture of a call whose prompts are other ones before each evaluation, put into its slot by hand."""
    read = {"prompt_syntax": "a1111", **call}
    told = [
        pipe.prepare(pipe.request(p, negative=n, **read)).samplings[0].conditioning
        for p, n in zip(prompts, negatives, strict=True)
    ]
    prepared = pipe.prepare(pipe.request(prompts[0], negative=negatives[0], **read))
    slots = pipe.make_slots(prepared.shape, 1)
    slots.admit(prepared.samplings[0], prepared.gaussians[0])
    for conditioning in told:
        prepared.samplings[0].conditioning = conditioning
        slots.tick([0])
    latents = np.empty((1, *prepared.shape), np.float32)
    slots.result(0, latents[0])
    return pipe.vae.decode(latents)


CALL = {"steps": 6, "seed": 3, "guidance": 4.0}
CIRCLES = [f"a red circle {BLUE}"] * 4 + [f"a green square {BLUE}"] * 2


def test_editing_and_alternation_are_the_prompts_put_in_by_hand(pipe: Pipeline) -> None:
    edited = pipe(f"a [red circle:green square:.5] {BLUE}", prompt_syntax="a1111", negative="[grey|dark]", **CALL)
    negatives = ["grey", "grey", "dark", "grey", "dark", "grey"]
    assert np.array_equal(edited.images, by_hand(pipe, CIRCLES, negatives, **CALL))
    plain = pipe(f"a red circle {BLUE}", prompt_syntax="a1111", negative="grey", **CALL)
    assert not np.array_equal(edited.images, plain.images)
    assert edited.parameters[0]["prompt"] == f"a [red circle:green square:.5] {BLUE}"


def test_samplers_of_two_stages_count_twice_and_pictures_count_from_what_they_leave(pipe: Pipeline) -> None:
    call = {"prompt_syntax": "a1111", "steps": 6, "seed": 0}
    (first, _), (edit, _) = (
        r := pipe.request("[a:b:.5]", sampler="heun", **call),
        r.runs(r.wording.positives[0]),
    )[1]
    assert (first, edit) == (0, 7)
    grey = np.full((64, 64, 3), 128, np.uint8)
    request = pipe.request("[a:b:2] [c:.5]", image=grey, strength=0.5, **call)
    assert request.program.evaluations == 3
    assert [(at, p.text) for at, p in request.runs(request.wording.positives[0])] == [(0, "a ")]


def test_prompts_of_other_lengths_take_turns(pipe: Pipeline) -> None:
    """Arrays of another number of chunks are repeated whole, as everywhere."""
    long = ", ".join(f"a red circle number {i}" for i in range(30))
    edited = pipe(f"[{long}|a green square]", prompt_syntax="a1111", **CALL)
    turns = [long, long, "a green square", long, "a green square", long]
    hand = by_hand(pipe, turns, [""] * 6, **CALL)
    assert np.abs(edited.images.astype(int) - hand.astype(int)).max() <= 1


def test_a_servers_batches_mix_them(pipe: Pipeline) -> None:
    asked = [(f"a [red:green:{k}] circle {BLUE}", k) for k in (1, 3)] + [(f"a [red|blue] ring {BLUE}", 5)]
    alone = [pipe(p, seed=s, steps=6, prompt_syntax="a1111").images for p, s in asked]
    with fewstep.Server(pipe, most_slots=3, most_rows=6, buckets=[6]) as server:
        tickets = [server.submit(p, seed=s, steps=6, prompt_syntax="a1111") for p, s in asked]
        for ticket, expected in zip(tickets, alone, strict=True):
            assert np.abs(ticket.result().images.astype(int) - expected.astype(int)).max() <= 1


def test_a_device_that_does_whole_requests_ticks_these(pipe: Pipeline) -> None:
    prompt = f"a [red circle:green square:.5] {BLUE}"
    with fewstep.load("base", backend="ort-cpu", device="cpu:torch", mode="latency", threads=1) as torch_pipe:
        steps: list[int] = []
        edited = torch_pipe(prompt, prompt_syntax="a1111", on_step=lambda s: steps.append(s.index), **CALL)
        assert steps == list(range(6))
        plain: list[int] = []
        torch_pipe(prompt, on_step=lambda s: plain.append(s.index), **CALL)
        assert plain == [5]  # as one piece of work
    expected = pipe(prompt, prompt_syntax="a1111", **CALL).images
    assert np.abs(edited.images.astype(int) - expected.astype(int)).max() <= 2


@pytest.fixture(scope="module")
def model() -> Engine:
    return engine("unet", SDXL)


def asked(i: int) -> tuple[Sampling, np.ndarray]:
    """An image that is told what others are, from its second and fourth evaluation on."""
    sampling, gaussian, _ = Image(program("euler", 5), i, 1.0 + i % 2, extra=True, number=1 + i).sampling()
    others = [Image(program("euler", 5), 10 + i + n, 1.0 + i % 2, extra=True, number=1).sampling()[0] for n in (0, 1)]
    later = tuple(
        Retold(first=first, positive=o.conditioning.positive, negative=o.conditioning.negative)
        for first, o in zip((1, 3), others, strict=True)
    )
    sampling.conditioning = replace(sampling.conditioning, tokens=2 * sampling.conditioning.tokens, later=later)
    return sampling, gaussian


@pytest.mark.parametrize("kind", ["torch", "recorded"])
def test_devices_agree_ticked_and_refuse_one_piece(model: Engine, kind: str) -> None:
    cache = GraphCache(TapeRecorder()) if kind == "recorded" else None
    latents = []
    for slots in (
        NumpySlots(model, slots=2, shape=SHAPE),
        TorchSlots(model, slots=2, shape=SHAPE, device="cpu", graphs=cache),
    ):
        latents.append(run(slots))
    assert np.abs(latents[0] - latents[1]).max() <= 1e-4 * np.abs(latents[0]).max()


def run(slots: Slots) -> np.ndarray:
    active = [slots.admit(*asked(i)) for i in (0, 1)]
    with pytest.raises(ArgumentError, match="changes on the way"):
        slots.run(active, model)  # type: ignore[arg-type]
    for _ in range(5):
        slots.tick(active)
    out = np.empty((2, *SHAPE), np.float32)
    for slot, into in zip(active, out, strict=True):
        slots.result(slot, into)
    return out


@pytest.mark.parametrize(
    ("prompt", "syntax", "words"),
    [
        ("a cat AND a dog", "a1111", "AND in a prompt"),
        ("embedding:easynegative", "plain", "--embedding easynegative=FILE"),
        ("(embedding:bad-hands:1.2)", "a1111", "load_embedding"),
        ("a cat <lora:style:0.8>", "plain", "--lora FILE:SCALE"),
        ("a cat <hypernet:style:0.8>", "plain", "<hypernet:style:0.8>"),
        ("a cat <hypernet:style:0.8>", "a1111", "<hypernet:style:0.8>"),
    ],
)
def test_marks_that_nothing_does_are_refused_by_name(pipe: Pipeline, prompt: str, syntax: str, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        pipe.request(prompt, prompt_syntax=syntax)
    if "AND" not in prompt:
        with pytest.raises(UnsupportedError, match=words):
            pipe.request("a cat", negative=prompt, prompt_syntax=syntax)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt": "a (red:1.3) circle"}, "(word:1.3)"),
        ({"prompt": "x", "negative": "[a:b:.5]"}, "[from:to:0.5]"),
        ({"prompt": ["x", "[a|b]"]}, "[one|other]"),
        ({"prompt": "a BREAK b"}, "BREAK"),
        ({"prompt": "a cat AND a dog"}, "holds AND, read here as a word"),
        ({"prompt": "x", "negative": "blue", "guidance": 1.0}, "no effect at guidance 1"),
        ({"prompt": "x", "sampler": "lcm"}, "does not suit embedded-base"),
        ({"prompt": "x", "fit": "cover"}, "without a picture"),
        ({"prompt": "x", "mask_threshold": None}, "without a mask"),
    ],
)
def test_what_has_no_effect_is_said(pipe: Pipeline, given: dict[str, Any], words: str) -> None:
    (warning,) = pipe.request(**given).warnings
    assert words in warning


def test_what_has_its_effect_is_not_said(pipe: Pipeline) -> None:
    for given in (
        {"prompt": "a red circle (on a blue one), 3:2 [sic]", "negative": "grey", "sampler": "dpmpp_2m"},
        {"prompt": "a (red:1.3) [b|c] circle", "prompt_syntax": "a1111"},
        {"prompt": "x", "negative": "", "guidance": 0.0},
        {"prompt": "A RED CIRCLE AND A STAR"},
    ):
        assert pipe.request(**given).warnings == ()


def test_a_warning_quotes_no_prompt_and_reaches_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        prompt = "a (secret:1.3) circle"
        assert main(["run", "student", "--prompt", prompt, "--steps", "1", "--output", str(tmp_path / "x.png")]) == 0
    assert "warning: A prompt holds (word:1.3), read here as words" in capsys.readouterr().err
    assert "secret" not in caplog.text
