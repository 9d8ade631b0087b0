"""Structured logs on demand: one JSON object a line, for whoever collects them."""

from __future__ import annotations

import json
import logging
import time
from typing import Any

LOGGERS = ("flwr", "fedmask_flwr")
_OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One object a record: ``time`` (UTC), ``level``, ``logger``, ``message``, ``error`` (a traceback), extras."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one line; what JSON cannot hold is written as text."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage().strip(),
            **{name: value for name, value in vars(record).items() if name not in _OWN},
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


def use_json() -> None:
    """Write what Flower and this package log as JSON; called again, it changes nothing."""
    for name in LOGGERS:
        logger = logging.getLogger(name)
        if not logger.handlers and name != "flwr":
            logger.addHandler(logging.StreamHandler())
            logger.propagate = False
        for handler in logger.handlers:
            handler.setFormatter(JsonFormatter())
