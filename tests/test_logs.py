"""JSON logs: one object a record, whatever is in it."""

from __future__ import annotations

import io
import json
import logging

from fedmask_flwr.logs import JsonFormatter, use_json


def lines(emit):
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("fedmask_flwr.test_logs")
    logger.handlers, logger.propagate = [handler], False
    emit(logger)
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_record_is_one_object():
    extra = {"round": 7, "path": object}
    (line,) = lines(lambda log: log.warning("node %d\nfailed: %s", 3, '"quoted"', extra=extra))
    assert line["message"] == 'node 3\nfailed: "quoted"'
    assert (line["level"], line["logger"], line["round"]) == ("WARNING", "fedmask_flwr.test_logs", 7)
    assert line["time"].endswith("Z")
    assert "object" in line["path"]


def test_an_exception_keeps_its_traceback():
    def emit(log):
        try:
            raise ValueError("no such thing")
        except ValueError:
            log.exception("turn failed")

    (line,) = lines(emit)
    assert line["message"] == "turn failed"
    assert "ValueError: no such thing" in line["error"]


def test_flower_s_log_becomes_json_once():
    loggers = [logging.getLogger(name) for name in ("flwr", "fedmask_flwr")]
    before = [(logger, logger.handlers[:], logger.propagate) for logger in loggers]
    kept = [(handler, handler.formatter) for _, handlers, _ in before for handler in handlers]
    try:
        use_json()
        use_json()
        own = logging.getLogger("fedmask_flwr").handlers
        assert len(own) == max(1, len(before[1][1]))
        for handler in [*logging.getLogger("flwr").handlers, *own]:
            assert isinstance(handler.formatter, JsonFormatter)
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
        for handler, formatter in kept:
            handler.setFormatter(formatter)
