"""The table of options: defaults, environment, and mistakes that name what would be right."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mpk_dynamo.errors import OptionError
from mpk_dynamo.settings import Settings, table


def make(environ: dict[str, str] | None = None, **options: object) -> Settings:
    return Settings.from_options(options, environ=environ or {})


def test_option_wins_over_variable_and_variable_over_default():
    assert make().workers == 0
    assert make({"MPK_WORKERS": "5"}).workers == 5
    assert make({"MPK_WORKERS": "5"}, workers=7).workers == 7


def test_every_option_can_be_set_by_its_variable():
    given = {
        "device": "reference", "workers": "3", "fallback": "eager", "dump_dir": "/d", "cache_dir": "/c",
        "progress": "False", "cache_mb": "9",
        "target": "sm_80", "flight": "2", "flight_waiting": "2", "timeout_s": "0.5",
        "profile": "/p", "profile_call": "4", "loop_steps": "7",
    }  # fmt: skip
    assert set(given) == {f.name for f in dataclasses.fields(Settings)}
    made = make({f"MPK_{name.upper()}": text for name, text in given.items()})
    assert {name: str(getattr(made, name)) for name in given} == given


def test_empty_variable_counts_as_unset():
    assert make({"MPK_FALLBACK": ""}).fallback == "auto"


def test_unknown_option_names_the_nearest_and_all():
    with pytest.raises(OptionError, match="unknown option 'worker'.*did you mean 'workers'.*fallback"):
        make(worker=3)


@pytest.mark.parametrize("options", [{"workers": "3"}, {"workers": 3.0}, {"workers": True}, {"fallback": None}])
def test_wrong_type_is_refused(options: dict[str, object]):
    with pytest.raises(OptionError, match="give a value of type"):
        make(**options)


def test_variable_that_does_not_parse_is_refused():
    with pytest.raises(OptionError, match="MPK_WORKERS is 'many'"):
        make({"MPK_WORKERS": "many"})


@pytest.mark.parametrize("options", [{"workers": -1}, {"flight": -1}, {"timeout_s": 0}, {"timeout_s": float("nan")}])
def test_out_of_range_is_refused(options: dict[str, object]):
    with pytest.raises(OptionError, match="give at least"):
        make(**options)


def test_wrong_choice_names_the_nearest():
    with pytest.raises(OptionError, match="did you mean 'inductor'"):
        make(fallback="inducter")


def test_paths_and_whole_numbers_are_taken():
    assert make(dump_dir=Path("/tmp/x")).dump_dir == "/tmp/x"
    assert make(timeout_s=2).timeout_s == 2.0


def test_table_lists_every_option():
    text = table()
    for field in dataclasses.fields(Settings):
        assert f"`{field.name}`" in text and f"`MPK_{field.name.upper()}`" in text
