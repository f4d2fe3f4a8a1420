"""A tracker of TVM's RPC."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def tracker() -> Iterator[str]:
    """Its address."""
    from tvm.rpc.tracker import Tracker

    made = Tracker(host="127.0.0.1", port=19190, port_end=19290, silent=True)
    yield f"127.0.0.1:{made.port}"
    made.terminate()
