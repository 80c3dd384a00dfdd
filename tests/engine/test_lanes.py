"""Lanes: what they hold on to, and what goes with them."""

from __future__ import annotations

import gc
import threading
import time
import weakref

from ensemble_decode.engine.lanes import Lanes


class Model:
    def forward(self) -> int:
        return 3


def test_a_waiting_lane_keeps_no_model_and_goes_with_its_owner() -> None:
    model = Model()
    seen, before = weakref.ref(model), threading.active_count()
    lanes = Lanes(2, "lanes")
    assert lanes.run([model.forward, model.forward]) == [3, 3]
    del model
    deadline = time.monotonic() + 10
    while seen() is not None and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert seen() is None
    del lanes
    while threading.active_count() > before and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.01)
    assert threading.active_count() == before
