"""What `fewstep samplers` and `fewstep schedule show` print."""

import json
from pathlib import Path

import pytest
from fewstep.errors import ArgumentError
from fewstep.schedules import NoiseSchedule, compile_program, listing
from fewstep.schedules.plot import plot_schedules
from fewstep.schedules.solvers.registry import SAMPLERS
from fewstep.schedules.spacing import SPACINGS

NOISE = NoiseSchedule.scaled_linear()


def test_samplers_are_listed_with_what_they_need() -> None:
    infos = {info.name: info for info in listing.list_samplers()}
    assert set(infos) == set(SAMPLERS)
    assert infos["unipc_3"].history == 4
    assert infos["heun"].evaluations == "2n - 1"
    assert infos["plms"].evaluations == "n + 1"
    assert infos["euler_ancestral"].draws == "always"
    assert "Euler a" in infos["euler_ancestral"].aliases
    assert infos["ddim"].options == {"eta": 0.0}
    assert all(info.source and info.summary for info in infos.values())
    text = listing.format_samplers(list(infos.values()))
    assert len(text.splitlines()) == len(SAMPLERS) + 1
    json.dumps(listing.as_data(list(infos.values())), allow_nan=False)


def test_schedules_are_listed_with_their_sources() -> None:
    infos = {info.name: info for info in listing.list_schedules()}
    assert set(infos) == set(SPACINGS)
    assert infos["ays_sd"].kind == "table"
    assert "ays" in infos["ays_sd"].aliases
    assert all(info.source and info.summary for info in infos.values())
    assert "trailing" in listing.format_schedules(list(infos.values()))


def test_what_suits_a_base_model_and_why_the_others_do_not() -> None:
    verdicts = {v.sampler: v for v in listing.samplers_for(NOISE)}
    assert verdicts["dpmpp_2m"].suits
    assert not verdicts["lcm"].suits
    assert "LCM" in verdicts["lcm"].why
    assert not verdicts["edm_euler"].suits
    text = listing.format_suitability(list(verdicts.values()))
    assert text.index("dpmpp_2m") < text.index("lcm ")


def test_zero_terminal_snr_with_epsilon_suits_nothing_that_starts_at_the_top() -> None:
    noise = NoiseSchedule.from_diffusers({**NOISE.config, "rescale_betas_zero_snr": True})
    verdicts = {v.sampler: v for v in listing.samplers_for(noise, prediction="epsilon")}
    assert not verdicts["ddim"].suits
    assert "v_prediction" in verdicts["ddim"].why
    assert {v.sampler: v for v in listing.samplers_for(noise, prediction="v_prediction")}["ddim"].suits


@pytest.mark.parametrize(
    ("family", "suits", "not_suits"),
    [
        ("lcm", "lcm", "euler"),
        ("tcd", "tcd", "lcm"),
        ("turbo", "euler_ancestral", "dpmpp_2m"),
        ("lightning", "euler", "unipc_2"),
        ("hyper", "ddim", "dpmpp_3m"),
    ],
)
def test_distilled_checkpoints_want_their_own(family: str, suits: str, not_suits: str) -> None:
    verdicts = {v.sampler: v for v in listing.samplers_for(NOISE, family=family)}
    assert verdicts[suits].suits
    assert not verdicts[not_suits].suits
    assert suits in verdicts[not_suits].why


def test_a_program_as_rows_and_as_text() -> None:
    program = compile_program("dpmpp_2m", schedule="karras", steps=6, start=2, noise=NOISE)
    rows = listing.program_table(program)
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    assert rows[1]["b"] == list(program.b[1])
    json.dumps(rows, allow_nan=False)
    text = listing.format_program(program)
    assert "2 of 6 steps skipped" in text
    assert len(text.splitlines()) == 2 + 4


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    path = tmp_path / "schedules.png"
    programs = [compile_program("euler", schedule=s, steps=10, noise=NOISE) for s in ("trailing", "karras", "ays")]
    plot_schedules(programs, path)
    with Image.open(path) as image:
        assert image.size == (960, 600)
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10
    with pytest.raises(ArgumentError, match="at least one"):
        plot_schedules([], path)
