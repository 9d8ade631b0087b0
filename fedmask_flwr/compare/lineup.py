"""Who is compared: ``fedpm, deltamask(kappa=1.0 codec=rice)`` and seeds become one run config a run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from fedmask_flwr.config import ConfigError, kebab, load_config, scalar
from fedmask_flwr.methods import resolve

__all__ = ["Entry", "Run", "lineup", "parse"]

Scalar = str | int | float | bool

# Settings that ride in the plan of each message, so that clients need no other run config. All else is equal.
OF_A_RUN = ("codec", "optimizer", "learning-rate", "include", "exclude")
SEEDS = 3  # when none are named
_ENTRY = re.compile(r"\s*(?P<method>[A-Za-z_][\w.:-]*)\s*(?:\((?P<inner>[^()]*)\)\s*)?(?=,|$)")
_PAIR = re.compile(r"(?P<key>[A-Za-z][\w-]*)=(?P<value>[^\s,()]+)")
_LONGEST = 120  # bytes of a folder's name; file systems take 255


@dataclass(frozen=True, slots=True)
class Entry:
    """One method with settings of its own, as written: (key, text) pairs."""

    method: str
    pairs: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        """How the entry is called in tables; ``parse`` reads it back."""
        inner = " ".join(f"{key}={text}" for key, text in self.pairs)
        return f"{self.method}({inner})" if inner else self.method


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a comparison: ``config`` is its whole run config, ``settings`` what is its entry's own."""

    label: str
    method: str
    settings: dict[str, Scalar]
    seed: int
    folder: str
    config: dict[str, Any]


def parse(text: str) -> tuple[Entry, ...]:
    """Read a comma-separated list of methods, each with ``(key=value key=value)`` where it has settings of its own.

    Values hold no space, comma or parenthesis.

    Raises
    ------
    ConfigError
        Saying what is wrong and where.
    """
    if not all(c.isprintable() or c.isspace() for c in text):
        raise ConfigError("compare holds a character that cannot be printed")
    entries: list[Entry] = []
    at = 0
    while True:
        found = _ENTRY.match(text, at)
        if found is None:
            rest = text[at:].strip()
            what = "a method is missing" if not rest or rest[0] == "," else f"cannot read {rest[:40]!r}"
            raise ConfigError(f"compare: {what}; write such as: fedpm, deltamask(kappa=1.0 codec=rice)")
        entry = Entry(found["method"], _pairs(found["method"], found["inner"] or ""))
        if entry in entries:
            raise ConfigError(f"compare: {entry.label} is there twice")
        entries.append(entry)
        if found.end() == len(text):
            return tuple(entries)
        at = found.end() + 1  # the comma


def _pairs(method: str, inner: str) -> tuple[tuple[str, str], ...]:
    pairs: dict[str, str] = {}
    for word in inner.replace(",", " ").split():
        found = _PAIR.fullmatch(word)
        if found is None:
            raise ConfigError(f"compare: {method}({word}): write KEY=VALUE, with no spaces around =")
        key = kebab(found["key"])
        if key in pairs:
            raise ConfigError(f"compare: {method} has {key} twice")
        pairs[key] = found["value"]
    return tuple(pairs.items())


def seeds_of(text: str, first: int) -> tuple[int, ...]:
    """Read comma-separated seeds; without any, three from the first.

    Raises
    ------
    ConfigError
        One is no whole number from 0 to 2**63 - 1, or is there twice.
    """
    if not text.strip():
        return tuple(range(first, first + SEEDS))
    words = [word.strip() for word in text.split(",")]
    wrong = [word for word in words if not re.fullmatch(r"[0-9]{1,19}", word) or int(word) >= 2**63]
    if wrong:
        raise ConfigError(f"seeds: {wrong[0]!r} is no whole number from 0 to 2**63 - 1")
    seeds = tuple(map(int, words))
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"seeds: one is there twice in {text}")
    return seeds


def lineup(flat: Mapping[str, Any]) -> tuple[Run, ...]:
    """Give the runs that ``compare`` and ``seeds`` of a run config ask for, in order: for each seed, each method.

    A client evaluates in each round (``fraction-evaluate`` is 1 when it is 0), since that is the only accuracy that
    all methods have.

    Raises
    ------
    ConfigError
        For text that cannot be read, an unknown method or key, a bad value, a setting that cannot differ between
        runs, and for two entries that are the same run.
    """
    seeds = seeds_of(str(flat.get("seeds", "")), int(flat.get("seed", 7)))
    shared = {**flat, "compare": "", "seeds": "", "fraction-evaluate": flat.get("fraction-evaluate") or 1.0}
    runs: list[Run] = []
    entries = [(entry, *_settled(entry, shared)) for entry in parse(str(flat.get("compare", "")))]
    for i, (entry, _, same) in enumerate(entries):
        if twin := next((other.label for other, _, its in entries[:i] if its == same), None):
            raise ConfigError(f"compare: {twin} and {entry.label} are the same run")
    for seed in seeds:
        for entry, own, _ in entries:
            config = {**shared, "method": entry.method, "seed": seed, **own}
            runs.append(Run(entry.label, entry.method, own, seed, f"{file_name(entry.label)}-s{seed}", config))
    folders = [run.folder.lower() for run in runs]
    if twice := next((f for f in folders if folders.count(f) > 1), None):
        raise ConfigError(f"compare: two runs would write the folder {twice}; reorder the settings of one")
    return tuple(runs)


def _settled(entry: Entry, shared: Mapping[str, Any]) -> tuple[dict[str, Scalar], tuple[Any, ...]]:
    """Type an entry's own settings and check them; also give what makes its run unlike others."""
    own = {key: scalar(f"{entry.method}: {key}", text, shared.get(key)) for key, text in entry.pairs}
    try:
        config, settings = load_config({**shared, "method": entry.method, **own}, given=own)
        fields = resolve(entry.method).Config.model_fields
    except ConfigError as error:
        raise ConfigError(f"compare: {entry.label}: {error}") from error
    its = {field.alias or name for name, field in fields.items()}
    if equal := sorted(set(own) - its - set(OF_A_RUN)):
        raise ConfigError(
            f"compare: {entry.label}: {', '.join(equal)} must be equal in all runs; of a method's own are its "
            f"settings and {', '.join(OF_A_RUN)}"
        )
    plan = [getattr(config, name.replace("-", "_")) for name in OF_A_RUN]
    return own, (entry.method, plan, resolve(entry.method).Config(**settings))


def file_name(label: str) -> str:
    """Make a label safe as the name of a folder, everywhere, and still readable."""
    name = re.sub(r"[^A-Za-z0-9.=+-]+", "_", label).strip("_.") or "run"
    if name != "run" and len(name) <= _LONGEST and not re.sub(r"[()\s\w.=+-]", "", label, flags=re.ASCII):
        return name
    return f"{name[:_LONGEST]}_{blake2b(label.encode(), digest_size=4).hexdigest()}"
