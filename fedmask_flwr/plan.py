"""How a run computes: what every end needs to build the same method, apart from the model."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

from torch import nn

from .config import RunConfig, patterns
from .methods import Method, Training, resolve
from .methods.reading import plain
from .wire import CODECS

AS_BUILT = "as-built"


@dataclass(frozen=True, slots=True)
class Plan:
    """How every client of a run answers; sent with each message so that only the server is configured.

    ``weights`` names the frozen weights ("seed:7", a checkpoint and its hash, or "as-built": the model arrives
    with them). ``run`` is drawn when a run first starts: a device's memory belongs to it. ``masks`` names the
    structural masks of the network, where it has some and all devices must have the same.
    """

    method: str
    settings: dict[str, Any]
    weights: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    seed: int
    rounds: int
    codec: str
    optimizer: str = "adam"
    lr: float | None = None
    run: str = ""
    masks: str = ""

    @classmethod
    def of(cls, config: RunConfig, settings: dict[str, Any], run: str = "", masks: str = "") -> Plan:
        """Plan of a run of the bundled app, from ``load_config`` and the folder's token."""
        return cls(
            config.method,
            settings,
            AS_BUILT,
            patterns(config.include),
            patterns(config.exclude),
            config.seed,
            config.num_server_rounds,
            config.codec,
            config.optimizer,
            config.lr,
            run,
            masks if config.same_masks else "",
        )

    def build(self, model: nn.Module, fraction: float = 1.0) -> Method[Any]:
        """Make the method on this end, for a model that holds the frozen weights."""
        method = resolve(self.method)
        spec = method.layout(model, self.include, self.exclude)
        return method(spec, model, method.Config(**self.settings), fraction=fraction)

    def training(self, lr: float | None = None, name: str | None = None) -> Training:
        """How a client trains, unless its own loop says otherwise.

        Raises
        ------
        ValueError
            For an unknown optimiser.
        """
        name = self.optimizer if name is None else name
        if name not in ("adam", "sgd"):
            raise ValueError(f'optimizer is {name!r}; use "adam" or "sgd"')
        return Training("adam" if name == "adam" else "sgd", self.lr if lr is None else lr)

    def identity(self, digest: bytes) -> str:
        """16 hex digits of everything that a device's memory depends on, for the model of that digest."""
        same = asdict(self) | {"rounds": 0, "codec": "", "model": digest.hex()}
        return blake2b(json.dumps(same, sort_keys=True).encode(), digest_size=8).hexdigest()

    def codecs(self, method: Method[Any]) -> dict[str, str]:
        """Codec names by kind, with the run's choice for mask bits."""
        return {**method.codecs, "bits": self.codec}

    @property
    def lossy(self) -> str:
        """The codec of mask bits where it may flip some, else ""."""
        named = CODECS.get(plain(self.codec))
        return "" if named is None or named.lossless else self.codec

    def check_codec(self) -> None:
        """Refuse a codec that the method cannot have.

        Raises
        ------
        ValueError
            The method needs exact bits, or counts a budget in those of codec "auto".
        """
        method = resolve(self.method)
        if method.exact and self.lossy:
            raise ValueError(f"{self.method} needs an exact codec, {self.codec} may flip bits: use auto")
        budget = method.Config(**self.settings).model_dump().get("target_bpp")
        if method.priced and budget and self.codec != "auto":
            raise ValueError(
                f"target-bpp of {self.method} is a budget for codec auto: with {self.codec} no round would hold it"
            )
