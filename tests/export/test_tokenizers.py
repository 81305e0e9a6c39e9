"""Tokenizers from every mix of files, against transformers' own ids."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import fewstep
import numpy as np
import pytest
from checkpoints import DEMO, copy
from fewstep.bundle import read_bundle
from fewstep.errors import CorruptError, MissingError, UnsupportedError
from fewstep.export import export_bundle
from fewstep.export.tokenizers import export_tokenizer
from refusals import edit
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

TEXTS = (
    "A Red Circle on a blue   background",
    "a <toy> and <TOY>, <toy>x <toy>_1 x<toy>",
    "hello! !! <|endoftext|> it's <|startoftext|>",
    "<pad> <style> [new] Word naïve Å 1234 \n\t ünï",
    "",
)
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}
SPECIAL = {**PLAIN, "normalized": False, "special": True}


def added(*entries: tuple[int, str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"id": i, "content": t, **rest} for i, t, rest in entries]


def decoder(*entries: tuple[int, str, dict[str, Any]]) -> dict[str, Any]:
    return {str(i): {"content": t, **rest} for i, t, rest in entries}


def typed(content: str, **rest: Any) -> dict[str, Any]:
    return {"__type": "AddedToken", "content": content, **SPECIAL, **rest}


BEGIN, END = (596, "<|startoftext|>", SPECIAL), (597, "<|endoftext|>", SPECIAL)
OLD = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
CASES: dict[str, dict[str, Any]] = {
    "vocabulary alone": {},
    "old files": {
        "tokenizer_config": {**OLD, "bos_token": typed("<|startoftext|>"), "eos_token": typed("<|endoftext|>"),
                             "pad_token": "<|endoftext|>", "add_prefix_space": False, "do_lower_case": True},
        "special_tokens_map": {"bos_token": {"content": "<|startoftext|>", **PLAIN}, "pad_token": "<|endoftext|>"},
    },
    "padding by special_tokens_map": {"tokenizer_config": OLD, "special_tokens_map": {"pad_token": "!"}},
    "special_tokens_map over the configuration": {
        "tokenizer_config": {**OLD, "pad_token": "<|endoftext|>"},
        "special_tokens_map": {"pad_token": {"content": "!", **PLAIN}},
    },
    "the configuration's decoder over special_tokens_map": {
        "tokenizer_config": {**OLD, "pad_token": "<|endoftext|>", "added_tokens_decoder": decoder(BEGIN, END)},
        "special_tokens_map": {"pad_token": "!"},
    },
    "OpenCLIP": {
        "tokenizer_config": {**OLD, "pad_token": "!", "added_tokens_decoder": decoder((0, "!", SPECIAL), BEGIN, END)},
    },
    "added_tokens": {"tokenizer_config": OLD, "added_tokens": {"<toy>": 598, "<style>": 599}},
    "added_tokens out of order and with a hole": {"added_tokens": {"<style>": 700, "<toy>": 598, "[new]": 599}},
    "added_tokens that are special": {
        "special_tokens_map": {"pad_token": "<pad>", "additional_special_tokens": ["<style>"]},
        "added_tokens": {"<pad>": 598, "<style>": 599},
    },
    "tokenizer": {"tokenizer": added(BEGIN, END, (598, "<toy>", PLAIN), (599, "<style>", SPECIAL))},
    "tokenizer and added_tokens": {
        "tokenizer": added(BEGIN, END, (598, "<toy>", PLAIN)), "added_tokens": {"<toy>": 598, "[new]": 599},
    },
    "the configuration's decoder": {
        "tokenizer_config": {**OLD, "added_tokens_decoder": decoder(BEGIN, END, (598, "<toy>", PLAIN))},
    },
    "the configuration's decoder over the others": {
        "tokenizer": added(BEGIN, END, (598, "<style>", PLAIN)),
        "added_tokens": {"[new]": 598},
        "tokenizer_config": {**OLD, "added_tokens_decoder": decoder(BEGIN, END, (598, "<toy>", PLAIN))},
    },
    "several vectors": {"added_tokens": {"<toy>": 598, "<toy>_1": 599, "<toy>_2": 600}},
    "additional special tokens": {"tokenizer_config": {**OLD, "additional_special_tokens": ["<style>", "<toy>"]}},
    "extra special tokens by name": {"tokenizer_config": {**OLD, "extra_special_tokens": {"toy_token": "<toy>"}}},
    "extra special tokens in two files": {
        "tokenizer_config": {**OLD, "extra_special_tokens": ["<toy>"]},
        "special_tokens_map": {"extra_special_tokens": ["<style>", "<toy>"]},
    },
    "a token of its own kind": {"tokenizer_config": {**OLD, "toy_token": "<toy>", "mask_token": "<style>"}},
    "stripping and single words": {
        "tokenizer_config": {**OLD, "added_tokens_decoder": decoder(
            BEGIN, END, (598, "<toy>", {**PLAIN, "lstrip": True, "rstrip": True}),
            (599, "word", {**PLAIN, "single_word": True}))},
    },
    "another normaliser in the file": {"tokenizer": added(BEGIN, END), "normalizer": None},
    "another begin": {"tokenizer_config": {**OLD, "bos_token": "<|endoftext|>", "unk_token": "!"}},
}  # fmt: skip


def folder_of(case: dict[str, Any], folder: Path) -> Path:
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(DEMO / "tokenizer" / name, folder)
    for name in ("tokenizer_config", "special_tokens_map", "added_tokens"):
        if name in case:
            (folder / f"{name}.json").write_text(json.dumps(case[name]))
    if "tokenizer" in case:
        data = json.loads((DEMO / "tokenizer" / "tokenizer.json").read_text())
        data["added_tokens"] = case["tokenizer"]
        if "normalizer" in case:
            data["normalizer"] = case["normalizer"]
        (folder / "tokenizer.json").write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize("name", CASES)
def test_ids_are_transformers(name: str, tmp_path: Path) -> None:
    folder = folder_of(CASES[name], tmp_path / "tokenizer")
    theirs = CLIPTokenizer.from_pretrained(folder)
    record = export_tokenizer(folder, tmp_path / "tokenizer.json", 77)
    ours = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert (record.bos_id, record.eos_id, record.pad_id) == (
        theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id
    )  # fmt: skip
    assert ours.get_vocab() == theirs.get_vocab()
    for text in TEXTS:
        assert ours.encode(text, add_special_tokens=False).ids == theirs(text, add_special_tokens=False).input_ids, text
        whole = ours.encode(text, add_special_tokens=False).ids[: record.length - 2]
        padded = [record.bos_id, *whole, record.eos_id]
        padded += [record.pad_id] * (record.length - len(padded))
        assert padded == theirs(text, padding="max_length", max_length=77, truncation=True).input_ids, text


def test_the_cases_differ(tmp_path: Path) -> None:
    """Which file says so does decide: most cases have ids of their own."""
    seen = set()
    for i, case in enumerate(CASES.values()):
        tokenizer = CLIPTokenizer.from_pretrained(folder_of(case, tmp_path / str(i)))
        seen.add(json.dumps([tokenizer.pad_token_id, *(tokenizer(t).input_ids for t in TEXTS)]))
    assert len(seen) >= 12


@pytest.mark.parametrize("size", ["tokenizer.json", "added_tokens.json", "tokenizer_config.json"])
def test_files_that_cannot_be_read(size: str, tmp_path: Path) -> None:
    folder = folder_of({"tokenizer": added(BEGIN, END)}, tmp_path / "tokenizer")
    for text in ("{", "[" * 5000, '{"added_tokens_decoder": {"x": 1}, "<toy>": {}, "model": 5, "added_tokens": 3}'):
        (folder / size).write_text(text)
        with pytest.raises(CorruptError):
            export_tokenizer(folder, tmp_path / "t.json", 77)
    (folder / size).write_text("{}")
    (folder / "tokenizer.json").unlink(missing_ok=True)
    (folder / "merges.txt").unlink()
    with pytest.raises(MissingError):
        export_tokenizer(folder, tmp_path / "t.json", 77)


def test_rules_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    for i, config in enumerate(({"padding_side": "left"}, {"split_special_tokens": True})):
        folder = folder_of({"tokenizer_config": {**OLD, **config}}, tmp_path / str(i))
        with pytest.raises(UnsupportedError, match="pads on the left"):
            export_tokenizer(folder, tmp_path / "t.json", 77)


def test_a_tokenizer_that_was_edited_is_refused(sd1_bundle: Any, tmp_path: Path) -> None:
    edited = copy(sd1_bundle.folder, tmp_path / "edited")
    edit(edited / "tokenizer.json", normalizer=None)
    with pytest.raises(CorruptError, match=r"tokenizer\.json was changed since the export"):
        fewstep.load(edited, threads=1)("A Red Circle", steps=1, seed=1)
    old = json.loads((sd1_bundle.folder / "bundle.json").read_text())
    assert [t.pop("sha256") for t in old["tokenizers"]] == [t.sha256 for t in sd1_bundle.tokenizers]
    older = copy(sd1_bundle.folder, tmp_path / "older")
    (older / "bundle.json").write_text(json.dumps(old))
    asked = {"steps": 1, "seed": 1}
    np.testing.assert_array_equal(
        fewstep.load(older, threads=1)("A Red Circle", **asked).images,
        fewstep.load(sd1_bundle, threads=1)("A Red Circle", **asked).images,
    )
    old["tokenizers"][0]["sha256"] = "x"
    (older / "bundle.json").write_text(json.dumps(old))
    with pytest.raises(CorruptError, match="sha256"):
        read_bundle(older)


def test_a_token_without_a_vector_is_refused(tiny_sd1: Path, tmp_path: Path) -> None:
    """Its tokenizer knows a word more than its text encoder: prompts without it work, as in transformers."""
    folder = copy(tiny_sd1, tmp_path / "more")
    edit(folder / "tokenizer" / "tokenizer.json", added_tokens=added(BEGIN, END, (598, "<toy>", PLAIN)))
    pipe = fewstep.load(export_bundle(folder, tmp_path / "b", gate=False), threads=1)
    assert pipe("a circle", steps=1, seed=1).images.any()
    with pytest.raises(fewstep.errors.ArgumentError, match="'<toy>', and the text encoder has no vector"):
        pipe("a <toy>", steps=1, seed=1)
