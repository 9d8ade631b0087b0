"""Who is compared: the text, the seeds, and one run config a run."""

from __future__ import annotations

import string

import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from fedmask_flwr.compare import Entry, lineup, parse
from fedmask_flwr.compare.lineup import file_name, seeds_of
from fedmask_flwr.config import ConfigError, load_config

WORDS = st.text(string.ascii_letters + string.digits + "._:-+=/#*[]'\"é", min_size=1, max_size=8)
KEYS = st.from_regex(r"[a-z][a-z0-9]{0,5}(-[a-z0-9]{1,4}){0,2}", fullmatch=True)
METHODS = st.from_regex(r"[a-zA-Z_][a-z0-9_.:-]{0,12}", fullmatch=True)
ENTRIES = st.builds(
    Entry, METHODS, st.dictionaries(KEYS, WORDS, max_size=3).map(lambda pairs: tuple(pairs.items()))
)


def grid(text, seeds="1,2", **changes):
    return lineup(tiny.run_config(compare=text, seeds=seeds, **changes))


@given(st.lists(ENTRIES, min_size=1, max_size=4, unique=True), st.sampled_from([",", ", ", " ,\n "]))
def test_labels_are_read_back(entries, comma):
    assert list(parse(comma.join(entry.label for entry in entries))) == entries


@given(st.text(max_size=40) | st.text("fed,(=) a", max_size=20))
def test_hostile_text_is_read_or_refused(text):
    try:
        entries = parse(text)
    except ConfigError as error:
        assert str(error)
        assert str(error).isprintable() or "\n" in text
    else:
        assert parse(", ".join(entry.label for entry in entries)) == entries


def test_commas_and_spaces_inside():
    (entry,) = parse(" deltamask ( kappa=1.0, codec=rice,)  ")
    assert entry == Entry("deltamask", (("kappa", "1.0"), ("codec", "rice")))
    assert entry.label == "deltamask(kappa=1.0 codec=rice)"
    assert parse("a(kappa_min=1)")[0].pairs == (("kappa-min", "1"),)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a method is missing"),
        ("fedpm,", "a method is missing"),
        ("fedpm,,fedavg", "a method is missing"),
        ("fedpm fedavg", "cannot read 'fedpm fedavg'"),
        ("fedpm(", r"cannot read 'fedpm\('"),
        ("fedpm)", r"cannot read 'fedpm\)'"),
        ("fedpm((a=1))", "cannot read"),
        ("fedpm, fedpm", "fedpm is there twice"),
        ("fedpm, fedpm()", "fedpm is there twice"),
        ("fedpm(theta0)", r"fedpm\(theta0\): write KEY=VALUE"),
        ("fedpm(theta0 = 0.5)", "no spaces around ="),
        ("fedpm(theta0=0.5 theta0=0.4)", "theta0 twice"),
        ("fedpm\x1b[31m", "cannot be printed"),
        ("fedprm", "fedprm: no method 'fedprm': use one of .*fedpm"),
        ("fedpm(kappa=1)", "fedpm.*unknown run-config key kappa"),
        ("fedpm(theta0=7)", "theta0"),
        ("fedpm(codec=zip)", "codec = 'zip'"),
        ("fedpm(local-epochs=9)", "local-epochs must be equal in all runs"),
        ("fedpm(fraction-train=0.5)", "fraction-train must be equal"),
        ("fedpm(weights=seed:1)", "weights must be equal"),
        ("fedpm(seed=1)", "seed must be equal"),
        ("fedpm(out=x)", "out must be equal"),
        ("fedpm(method=fedavg)", "method must be equal"),
        ("fedavg, fedpm, fedpm(theta0=0.5)", r"fedpm and fedpm\(theta0=0.5\) are the same run"),
        ("fedpm(theta0=0.50), fedpm(theta0=0.5)", "are the same run"),
        ("fedpm(codec=auto), fedpm", "are the same run"),
    ],
)
def test_what_is_wrong_is_named(text, message):
    with pytest.raises(ConfigError, match=message):
        grid(text)


@pytest.mark.parametrize("text", ["1,1", "1;2", "x", "-1", "1,", str(2**63), "9" * 5000, "١"])
def test_wrong_seeds(text):
    with pytest.raises(ConfigError, match="seeds: "):
        grid("fedpm", text)


def test_seeds():
    assert seeds_of(" 5, 0 ", 7) == (5, 0)
    assert seeds_of(" ", 7) == (7, 8, 9)
    assert [run.seed for run in grid("fedpm", "", seed=3)] == [3, 4, 5]


def test_a_run_config_a_run():
    runs = grid("fedpm, deltamask(kappa=1 codec=rice learning-rate=1)", learning_rate=0.5, theta0=0.25)
    assert [(run.label[:5], run.seed) for run in runs] == [("fedpm", 1), ("delta", 1), ("fedpm", 2), ("delta", 2)]
    pm, delta = (load_config(run.config) for run in runs[:2])
    assert (pm[0].method, pm[0].seed, pm[0].codec, pm[0].lr, pm[1]["theta0"]) == ("fedpm", 1, "auto", 0.5, 0.25)
    assert (delta[0].method, delta[0].codec, delta[0].lr, delta[1]["kappa"]) == ("deltamask", "rice", 1.0, 1.0)
    assert isinstance(delta[1]["kappa"], float)
    same = {"compare": "", "seeds": "", "fraction-evaluate": 1.0, "theta0": 0.25, "data": "tiny:blobs"}
    for run in runs:
        assert {key: run.config[key] for key in same} == same
        assert run.config.keys() == tiny.declared_config().keys()
    assert grid("fedpm", fraction_evaluate=0.25)[0].config["fraction-evaluate"] == 0.25


def test_a_method_of_one_s_own():
    (run,) = grid("personal:Personal(prior=2)", "4")
    assert (run.method, run.settings, run.config["prior"]) == ("personal:Personal", {"prior": 2.0}, 2.0)


def test_folders():
    names = [run.folder for run in grid("fedpm, deltamask(kappa=0.5 codec=rice), personal:Personal", "4")]
    assert names[:2] == ["fedpm-s4", "deltamask_kappa=0.5_codec=rice-s4"]
    assert names[2].startswith("personal_Personal_")


@given(st.lists(ENTRIES, min_size=2, max_size=2, unique=True))
def test_file_names_are_plain(entries):
    names = [file_name(entry.label) for entry in entries]
    for name in names:
        assert set(name) <= set(string.ascii_letters + string.digits + "._=+-")
        assert 0 < len(name.lstrip(".")) <= 130
    assert len(file_name("a" * 500)) < 140
    assert file_name("a" * 500) != file_name("a" * 501)
