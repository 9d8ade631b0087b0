"""A body larger than any that its codec writes is refused for its size, before it is decoded."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fedmask_flwr.wire import Frame, Payload, SideInfo, WireError, pack, unpack

KNOWN = SideInfo((1000,))
PAYLOAD = Payload({"mask": np.packbits(np.arange(1000) % 7 == 0, bitorder="little")}, {}, {}, {})


@pytest.mark.parametrize("codec", ["rice", "entropy", "bits"])
def test_a_body_that_no_encoder_writes(codec):
    frame = Frame.parse(pack(PAYLOAD, digest=b"oversize", round_=1, known=KNOWN, codecs={"bits": codec}))
    body = bytes(frame.fields[0].body)
    huge = replace(frame, fields=(replace(frame.fields[0], body=body + bytes(10**6)),)).to_bytes()
    with pytest.raises(WireError, match=rf"a body has {len(body) + 10**6} bytes, at most \d+ are possible here"):
        unpack(huge, digest=b"oversize", round_=1, known=KNOWN, expect={"mask": 1000})
