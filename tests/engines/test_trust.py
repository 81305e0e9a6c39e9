"""Who may put engines where they are looked for: every folder and link on the way, when a store is made and used."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fewstep.bundle import Bundle
from fewstep.engines import Store, build_engines, open_engine
from fewstep.engines.trust import ways
from fewstep.errors import UnsafeFileError

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no owners of files here")
as_root = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give a folder away")
OTHER = 12345
DEPTHS = ("a", "a/b", "a/b/c")


def deep(tmp_path: Path) -> Path:
    (tmp_path / DEPTHS[-1]).mkdir(parents=True)
    return tmp_path / DEPTHS[-1] / "engines"


@pytest.mark.parametrize("mode", [0o777, 0o757, 0o722, 0o775, 0o770])
@pytest.mark.parametrize("which", DEPTHS)
def test_a_parent_that_others_can_write_to_is_refused(tmp_path: Path, which: str, mode: int) -> None:
    root = deep(tmp_path)
    if mode & 0o020 and not mode & 0o002:
        if os.geteuid():
            pytest.skip("only root can give a folder another group")
        os.chown(tmp_path / which, -1, OTHER)
    (tmp_path / which).chmod(mode)
    with pytest.raises(
        UnsafeFileError, match=rf"{which}'.*mode {mode:04o}.*chmod go-w .*{which}\. .*FEWSTEP_CACHE_DIR"
    ):
        Store(root)


@pytest.mark.parametrize("mode", [0o1777, 0o755, 0o711, 0o700])
def test_a_parent_that_is_sticky_or_ones_own_is_taken(tmp_path: Path, mode: int) -> None:
    root = deep(tmp_path)
    (tmp_path / "a").chmod(mode)
    assert Store(root).root == root


@as_root
@pytest.mark.parametrize("which", DEPTHS)
def test_a_parent_of_another_user_is_refused(tmp_path: Path, which: str) -> None:
    root = deep(tmp_path)
    os.chown(tmp_path / which, OTHER, -1)
    with pytest.raises(UnsafeFileError, match=f"belongs to user {OTHER}"):
        Store(root)


def test_the_way_goes_through_links_and_what_they_lead_through(tmp_path: Path) -> None:
    """A link is as good as the folders that it stands in and leads through, seen or not in the path that was given."""
    for name in ("open", "real", "home"):
        (tmp_path / name).mkdir()
    (tmp_path / "open" / "hop").symlink_to("../real")
    (tmp_path / "home" / "cache").symlink_to(tmp_path / "open" / "hop")
    passed = list(ways(tmp_path / "home" / "cache"))
    assert {tmp_path / n for n in ("home", "home/cache", "open", "open/hop", "real")} <= set(passed)
    assert passed[0] == Path("/")
    Store(tmp_path / "home" / "cache" / "engines")
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UnsafeFileError, match=r"open'.*0777"):
        Store(tmp_path / "home" / "cache" / "engines")
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(UnsafeFileError, match="links on its way"):
        list(ways(tmp_path / "round" / "x"))


@as_root
def test_a_link_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    (tmp_path / "mine").mkdir()
    link = tmp_path / "shared" / "cache"
    link.symlink_to(tmp_path / "mine")
    os.chown(link, OTHER, -1, follow_symlinks=False)
    with pytest.raises(UnsafeFileError, match=f"belongs to user {OTHER}"):
        Store(link / "engines")


def _given_away(store: Store) -> None:
    os.chown(store.root, OTHER, -1)


def _opened(store: Store) -> None:
    store.root.chmod(0o777)


def _linked(store: Store) -> None:
    store.root.rename(store.root.with_name("elsewhere"))
    store.root.symlink_to(store.root.with_name("elsewhere"))


def _parent_opened(store: Store) -> None:
    store.root.parent.chmod(0o777)


def _swapped(store: Store) -> None:
    """Another user's copy stands where the store was."""
    store.root.rename(store.root.with_name("away"))
    shutil.copytree(store.root.with_name("away"), store.root)
    for path in (store.root, *store.root.rglob("*")):
        os.chown(path, OTHER, -1)


@as_root
@pytest.mark.parametrize("change", [_given_away, _opened, _linked, _parent_opened, _swapped])
def test_what_is_used_is_what_was_checked(bundle: Bundle, tmp_path: Path, change: Callable[[Store], None]) -> None:
    """After a store was made and has served, its folder becomes one that would have been refused: so it is at use."""
    store = Store(tmp_path / "cache" / "engines")
    (built,) = build_engines(bundle, backend="ort-cpu", components=["unet"], store=store, gate=False).values()
    change(store)
    uses: list[Callable[[], object]] = [
        lambda: open_engine(bundle, "unet", backend="ort-cpu", store=store, build="never"),
        lambda: open_engine(bundle, "vae_decoder", backend="ort-cpu", store=store),
        lambda: build_engines(bundle, backend="ort-cpu", components=["unet"], store=store, force=True, gate=False),
        lambda: store.find(built.entry.key),
        lambda: store.record_gate(built.entry, {"passed": True}),
        lambda: list(store.entries()),
    ]
    for use in uses:
        with pytest.raises(UnsafeFileError):
            use()
