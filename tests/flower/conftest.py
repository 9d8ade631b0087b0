"""A continual run that tests only look at."""

from __future__ import annotations

import pytest
from continual_runs import go, heard


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """An undisturbed run that retrieves: lines, folder and replies of training and evaluation."""
    folder, trained, judged = tmp_path_factory.mktemp("whole") / "run", {}, {}

    def tamper(reply, message, context):
        for kind, story in (("train", trained), ("evaluate", judged)):
            heard(kind, story)(reply, message, context)
        return reply

    lines, _ = go(folder, tamper=tamper, retrieve=1)
    return lines, folder, trained, judged
