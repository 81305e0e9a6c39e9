"""What tests of exports share: that something is refused whole, and checkpoints changed in one place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fewstep.errors import FewstepError
from fewstep.export import export_bundle
from safetensors.numpy import load_file, save_file


def refused(source: Path | str, target: Path, kind: type[FewstepError], words: str, **options: Any) -> None:
    """The export raises `kind` with these words and a way out, and leaves nothing behind."""
    with pytest.raises(kind, match=words) as caught:
        export_bundle(source, target, **options)
    assert caught.value.remedy or caught.value.expected
    assert not target.exists()
    assert not list(target.parent.glob(f".{target.name}*")), "something half-written stayed"


def rewrite(path: Path, target: Path, change: Any) -> Path:
    """The tensors of a file, changed, in another."""
    weights = load_file(path)
    change(weights)
    save_file(weights, target)
    return target


def edit(path: Path, **changes: Any) -> None:
    """Other values in a JSON file."""
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))
