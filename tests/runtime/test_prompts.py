"""Long and weighted prompts, embeddings, second prompts, sizes: against diffusers, and the web UI's rule in torch."""

from __future__ import annotations

import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import fewstep
import numpy as np
import pytest
import torch
from fewstep.errors import ArgumentError, FewstepError, UnknownNameError, UnsupportedError
from fewstep.runtime.prompts.syntax import Chunk, TextSpan, check_clip_skip, lay_out, parse_a1111
from peers import LEAST_PSNR, generators, pipelines, pixels, psnr

LONG = ", ".join(f"a red circle number {i} beside a green square" for i in range(14))
MIDDLE = ", ".join(f"blurry grey shape {i}" for i in range(16))
CALL = {"steps": 3, "guidance": 4.0}


@pytest.fixture(scope="module", params=["sd1", "sd2", "sdxl"])
def both(request: pytest.FixtureRequest) -> dict[str, Any]:
    name = request.param
    checkpoint = request.getfixturevalue(f"tiny_{name}")
    bundle = request.getfixturevalue(f"{name}_bundle")
    return {"name": name, "ours": fewstep.load(bundle), **pipelines(checkpoint, big=name == "sdxl")}


def encode_in_torch(pipe: Any, chunks_by_encoder: list[list[tuple[list[int], list[float]]]]) -> dict[str, Any]:
    """The web UI's published rule on transformers' own modules, for one prompt.

    Each chunk is encoded alone between begin and end, its states are multiplied by their tokens' weights, and its
    mean is restored; chunks are put one after the other. The pooled vector is the first chunk's, unweighted.
    """
    encoders = [(pipe.tokenizer, pipe.text_encoder)]
    big = hasattr(pipe, "text_encoder_2")
    if big:
        encoders.append((pipe.tokenizer_2, pipe.text_encoder_2))
    hidden, pooled = [], None
    for (tokenizer, model), chunks in zip(encoders, chunks_by_encoder, strict=True):
        states = []
        for at, (tokens, weights) in enumerate(chunks):
            ids = [tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id]
            ids += [tokenizer.pad_token_id] * (77 - len(ids))
            with torch.no_grad():
                out = model(torch.tensor([ids]), output_hidden_states=True)
            z = out.hidden_states[-2] if big else out[0]
            scale = torch.tensor([1.0, *weights, *[1.0] * (76 - len(weights))])[None, :, None]
            before = z.mean()
            z = z * scale
            states.append(z * (before / z.mean()))
            if at == 0 and big:
                pooled = out[0]
        hidden.append(torch.cat(states, dim=1))
    return {"prompt_embeds": torch.cat(hidden, dim=-1), "pooled_prompt_embeds": pooled}


def plain_chunks(pipe: Any, text: str, count: int | None = None) -> list[list[tuple[list[int], list[float]]]]:
    made = []
    for tokenizer in (pipe.tokenizer, getattr(pipe, "tokenizer_2", None)):
        if tokenizer is not None:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            made.append([(ids[i : i + 75], [1.0] * 75) for i in range(0, max(1, len(ids)), 75)])
            made[-1] = [(ids, weights[: len(ids)]) for ids, weights in made[-1]]
    return [c * (count // len(c)) for c in made] if count else made


def theirs(pipe: Any, positive: dict[str, Any], negative: dict[str, Any], seed: int) -> np.ndarray:
    given = {**positive, **{f"negative_{k}": v for k, v in negative.items()}}
    given = {k: v for k, v in given.items() if v is not None}
    out = pipe(**given, num_inference_steps=3, guidance_scale=4.0, generator=generators([seed]), output_type="np")
    return pixels(out)


def test_long_prompts_in_chunks(both: dict[str, Any]) -> None:
    """Three chunks against one: the shorter prompt is repeated whole, which attention does not notice."""
    pipe = both["text"]
    count = len(plain_chunks(pipe, LONG)[0])
    assert count >= 3
    expected = theirs(
        pipe,
        encode_in_torch(pipe, plain_chunks(pipe, LONG)),
        encode_in_torch(pipe, plain_chunks(pipe, "grey", count)),
        5,
    )
    result = both["ours"](LONG, negative="grey", seed=5, long_prompts="chunk", **CALL)
    assert psnr(result.images, expected) >= LEAST_PSNR
    assert result.truncated == (False,)
    cut = both["ours"](LONG, negative="grey", seed=5, **CALL)
    assert psnr(cut.images, expected) < LEAST_PSNR, "the words after the first 75 tokens must matter"


def test_a_long_prompt_is_cut_as_diffusers_cuts_it(both: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    both["ours"].text.forget()
    with caplog.at_level(logging.WARNING, "fewstep.runtime"):
        result = both["ours"]([LONG, "short"], seed=5, **CALL)
    assert result.truncated == (True, False)
    assert "1 prompt(s) are longer" in caplog.text
    out = both["text"](LONG, num_inference_steps=3, guidance_scale=4.0, generator=generators([5]), output_type="np")
    assert psnr(result.images[:1], pixels(out)) >= LEAST_PSNR


def test_repeating_whole_chunks_changes_nothing(both: dict[str, Any]) -> None:
    """Prompts of one, two and three chunks in one request are what they are alone; so are slots that share a tick."""
    ours = both["ours"]
    prompts = ["short", MIDDLE, LONG]
    counts = [len(plain_chunks(both["text"], p)[0]) for p in prompts]
    assert len(set(counts)) == 3
    call = {**CALL, "long_prompts": "chunk", "negative": "x"}
    together = ours(prompts, seed=[1, 2, 3], **call)
    for i, prompt in enumerate(prompts):
        alone = ours(prompt, seed=i + 1, **call)
        assert psnr(together.images[i], alone.images[0]) >= LEAST_PSNR


def test_slots_of_different_prompt_length_share_an_evaluation(sd1_bundle: Any) -> None:
    from fewstep.runtime.device.numpy_slots import NumpySlots

    ours = fewstep.load(sd1_bundle)
    prepared = [
        ours.prepare(ours.request(p, seed=i, prompt_syntax="a1111", steps=3, guidance=3.0))
        for i, p in enumerate(("a red BREAK green BREAK blue circle", "short", "a grey BREAK ring"))
    ]
    alone = [ours.stream(p.request) for p in prepared]
    expected = [run(s).latents[0] for s in alone]
    slots = NumpySlots(ours.engines["unet"], slots=3, shape=prepared[0].shape)
    held = [slots.admit(p.samplings[0], p.gaussians[0]) for p in prepared]
    for _ in range(prepared[0].request.program.evaluations):
        slots.tick(held)
    assert len(slots.take_times().evaluations) == prepared[0].request.program.evaluations, "one evaluation a tick"
    for slot, latent in zip(held, expected, strict=True):
        out = np.empty(prepared[0].shape, np.float32)
        slots.result(slot, out)
        np.testing.assert_allclose(out, latent, atol=3e-4)


def run(stream: Any) -> Any:
    while True:
        try:
            next(stream)
        except StopIteration as stop:
            return stop.value


PUBLISHED = [
    ("normal text", [("normal text", 1.0)]),
    ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
    ("(unbalanced", [("unbalanced", 1.1)]),
    (r"\(literal\]", [("(literal]", 1.0)]),
    ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
    (
        "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
        [
            ("a ", 1.0),
            ("house", 1.5730000000000004),
            (" ", 1.1),
            ("on", 1.0),
            (" a ", 1.1),
            ("hill", 0.55),
            (", sun, ", 1.1),
            ("sky", 1.4641000000000006),
            (".", 1.1),
        ],
    ),
]


@pytest.mark.parametrize(("text", "expected"), PUBLISHED)
def test_the_published_examples_of_the_syntax(text: str, expected: list[tuple[str, float]]) -> None:
    """The examples that the web UI's own parser documents."""
    found = parse_a1111(text)
    assert [p.text for p in found] == [t for t, _ in expected]
    np.testing.assert_allclose([p.weight for p in found], [w for _, w in expected], rtol=1e-12)


def test_odd_marks_are_words() -> None:
    assert parse_a1111("") == [TextSpan("")]
    assert parse_a1111("a :1.3) b] 5:30 (x:y)") == [TextSpan("a :1.3) b] 5:30 "), TextSpan("x:y", 1.1)]
    assert parse_a1111("one BREAK two BREAKFAST")[1].ends_chunk
    assert [p.text for p in parse_a1111("one BREAK two BREAKFAST")] == ["one", "", "two BREAKFAST"]
    assert parse_a1111("(a:1.2.3)") == [TextSpan("a:1.2.3)", 1.1)]
    assert parse_a1111("(a:0)[b:1]") == [TextSpan("a", 0.0), TextSpan("b:1", 1 / 1.1)]
    for heavy in ("(a:1000000)", "(" * 80 + "a", "(a" * 5000, "((a:1000):1000)", "(a:1" + "0" * 400 + ")"):
        with pytest.raises(ArgumentError, match="at most 1000"):
            parse_a1111(heavy)
    hostile = "[a" * 5000 + "]" * 5000 + "BREAK [" * 100
    assert len(parse_a1111(hostile)) > 100


def test_chunks_end_at_a_comma_that_is_near() -> None:
    comma = 7
    ids = [1] * 60 + [comma] + [2] * 30
    assert [len(c.tokens) for c in lay_out([(ids, TextSpan("x"))], 75, comma)] == [61, 30]
    assert [len(c.tokens) for c in lay_out([(ids, TextSpan("x"))], 75, None)] == [75, 16]
    far = [1] * 50 + [comma] + [2] * 40
    assert [len(c.tokens) for c in lay_out([(far, TextSpan("x"))], 75, comma)] == [75, 16]
    broken = lay_out(
        [([1, 2], TextSpan("a", 2.0)), ([], TextSpan("", ends_chunk=True)), ([3], TextSpan("b"))], 75, comma
    )
    assert broken == [Chunk((1, 2), (2.0, 2.0)), Chunk((3,), (1.0,))]
    assert lay_out([], 75, None) == [Chunk((), ())]


def test_weighted_prompts(both: dict[str, Any]) -> None:
    """`a (red circle:1.4) and [grey] BREAK blue`, laid out by hand, against the rule in torch."""
    pipe = both["text"]

    def chunks(*parts: list[tuple[str, float]]) -> list[list[tuple[list[int], list[float]]]]:
        made = []
        for tokenizer in (pipe.tokenizer, getattr(pipe, "tokenizer_2", None)):
            if tokenizer is None:
                continue
            made.append([])
            for chunk in parts:
                ids = [(i, w) for t, w in chunk for i in tokenizer(t, add_special_tokens=False).input_ids]
                made[-1].append(([i for i, _ in ids], [w for _, w in ids]))
        return made

    positive = chunks([("a ", 1.0), ("red circle", 1.4), (" and ", 1.0), ("grey", 1 / 1.1)], [("blue", 1.0)])
    negative = chunks([("ugly", 1.1)], [("ugly", 1.1)])
    expected = theirs(pipe, encode_in_torch(pipe, positive), encode_in_torch(pipe, negative), 8)
    call = {"negative": "(ugly)", "seed": 8, **CALL}
    text = "a (red circle:1.4) and [grey] BREAK blue"
    result = both["ours"](text, prompt_syntax="a1111", **call)
    assert psnr(result.images, expected) >= LEAST_PSNR
    assert psnr(both["ours"](text, **call).images, expected) < LEAST_PSNR, "brackets are words unless asked for"


def test_embeddings_instead_of_prompts(both: dict[str, Any]) -> None:
    pipe, big = both["text"], both["name"] == "sdxl"
    positive = encode_in_torch(pipe, plain_chunks(pipe, "a red circle"))
    negative = encode_in_torch(pipe, plain_chunks(pipe, "grey"))
    expected = theirs(pipe, positive, negative, 3)
    given = {**positive, **{f"negative_{k}": v for k, v in negative.items()}}
    given = {k: v for k, v in given.items() if v is not None}
    result = both["ours"](**given, seed=3, **CALL)
    assert psnr(result.images, expected) >= LEAST_PSNR
    arrays = {k: v.numpy() for k, v in given.items()}
    np.testing.assert_array_equal(both["ours"](**arrays, seed=3, **CALL).images, result.images)
    with pytest.raises(ArgumentError, match="a prompt and prompt_embeds"):
        both["ours"]("x", **given)
    with pytest.raises(ArgumentError, match="expected \\[\\*, \\*, "):
        both["ours"](**{**arrays, "prompt_embeds": np.zeros((1, 77, 5))})
    with pytest.raises(ArgumentError, match="NaN"):
        both["ours"](**{**arrays, "prompt_embeds": arrays["prompt_embeds"] * np.nan})
    if big:
        with pytest.raises(ArgumentError, match="without pooled_prompt_embeds"):
            both["ours"](prompt_embeds=arrays["prompt_embeds"])


@pytest.mark.parametrize("skip", [1, 2])
def test_clip_skip(both: dict[str, Any], skip: int) -> None:
    """diffusers' rule in torch: an earlier layer, through the last norm but in SDXL; the negative prompt keeps its."""
    pipe, big = both["text"], both["name"] == "sdxl"
    encoders = [(pipe.tokenizer, pipe.text_encoder)]
    if big:
        encoders.append((pipe.tokenizer_2, pipe.text_encoder_2))
    hidden = []
    for tokenizer, model in encoders:
        ids = tokenizer("a red circle", padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            states = model(ids, output_hidden_states=True).hidden_states
            norm = getattr(model, "text_model", model).final_layer_norm
            hidden.append(states[-(skip + 2)] if big else norm(states[-(skip + 1)]))
    positive = encode_in_torch(pipe, plain_chunks(pipe, "a red circle"))
    negative = encode_in_torch(pipe, plain_chunks(pipe, "grey"))
    expected = theirs(pipe, {**positive, "prompt_embeds": torch.cat(hidden, dim=-1)}, negative, 5)
    result = both["ours"]("a red circle", negative="grey", clip_skip=skip, seed=5, **CALL)
    assert psnr(result.images, expected) >= LEAST_PSNR
    assert psnr(both["ours"]("a red circle", negative="grey", seed=5, **CALL).images, expected) < LEAST_PSNR


def test_clip_skip_needs_a_graph_that_has_it(sd1_bundle: Any) -> None:
    encoder = sd1_bundle.components["text_encoder"]
    older = replace(encoder, inputs=tuple(s for s in encoder.inputs if s.name != "clip_skip"))
    bundle = replace(sd1_bundle, components={**sd1_bundle.components, "text_encoder": older})
    assert check_clip_skip(bundle, 0) == 0
    with pytest.raises(UnsupportedError, match="Export the checkpoint again"):
        check_clip_skip(bundle, 1)


@pytest.fixture(scope="module")
def big(tiny_sdxl: Path, sdxl_bundle: Any) -> dict[str, Any]:
    return {"ours": fewstep.load(sdxl_bundle), **pipelines(tiny_sdxl, big=True)}


@pytest.mark.parametrize(
    "given",
    [
        {"prompt_2": "a green square"},
        {"prompt_2": "a green square", "negative": "grey", "negative_2": "blurry"},
        {"negative": "", "negative_2": "blurry"},
    ],
)
def test_second_prompts(big: dict[str, Any], given: dict[str, str]) -> None:
    named = {{"negative": "negative_prompt", "negative_2": "negative_prompt_2"}.get(k, k): v for k, v in given.items()}
    out = big["text"](
        "a red circle", num_inference_steps=3, guidance_scale=4.0, generator=generators([2]), output_type="np", **named
    )
    result = big["ours"]("a red circle", seed=2, steps=3, guidance=4.0, **given)
    assert psnr(result.images, pixels(out)) >= LEAST_PSNR


def test_sizes_and_crops(big: dict[str, Any]) -> None:
    out = big["text"](
        "a red circle",
        original_size=(300, 200),
        crops_coords_top_left=(7, 9),
        target_size=(128, 96),
        negative_original_size=(20, 30),
        negative_crops_coords_top_left=(1, 2),
        negative_target_size=(40, 50),
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=generators([2]),
        output_type="np",
    )
    plain = {"seed": 2, "steps": 3, "guidance": 4.0}
    result = big["ours"](
        "a red circle",
        original_size=(200, 300),
        crop_top_left=(7, 9),
        target_size=(96, 128),
        negative_original_size=(30, 20),
        negative_crop_top_left=(1, 2),
        negative_target_size=(50, 40),
        **plain,
    )
    assert psnr(result.images, pixels(out)) >= LEAST_PSNR
    assert psnr(big["ours"]("a red circle", **plain).images, pixels(out)) < LEAST_PSNR


BAD: list[tuple[dict[str, Any], type[FewstepError], str]] = [
    ({"prompt_syntax": "a1112"}, UnknownNameError, "a1111"),
    ({"long_prompts": "shorten"}, UnknownNameError, "truncate"),
    ({"prompt_2": "x"}, ArgumentError, "one text encoder"),
    ({"original_size": (3, 4)}, ArgumentError, "told no sizes"),
    ({"clip_skip": 99}, ArgumentError, "clip_skip is 99"),
    ({"clip_skip": True}, ArgumentError, "clip_skip is True"),
    ({"prompt": LONG * 5, "long_prompts": "chunk"}, ArgumentError, "chunks of 75 tokens"),
    ({"prompt": None}, ArgumentError, "neither a prompt nor"),
    ({"start": 1}, ArgumentError, "start cannot be set"),
]


@pytest.mark.parametrize(("given", "kind", "words"), BAD, ids=[next(iter(g)) for g, _, _ in BAD])
def test_what_cannot_be_read_is_refused(
    sd1_bundle: Any, given: dict[str, Any], kind: type[FewstepError], words: str
) -> None:
    pipe = fewstep.load(sd1_bundle)
    with pytest.raises(kind, match=words):
        pipe(**{"prompt": "x", "steps": 1, **given})


def test_lengths_without_a_common_multiple_are_refused(sd1_bundle: Any) -> None:
    pipe = fewstep.load(sd1_bundle)
    prompts = [" BREAK ".join("abcdefgh"[:n]) for n in (5, 7)]
    with pytest.raises(ArgumentError, match="385, 539 tokens"):
        pipe(prompts, seed=0, steps=1, prompt_syntax="a1111")


def test_the_signature_names_every_argument(sd1_bundle: Any) -> None:
    import inspect

    for function in (fewstep.Pipeline.__call__, fewstep.Pipeline.request):
        assert {"prompt_embeds", "steps", "clip_skip", "prompt_syntax"} <= set(inspect.signature(function).parameters)
