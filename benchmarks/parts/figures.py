"""What plain torch reaches on the device: the roofline that all other parts are put beside."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.registry import Measure, Row, Setting
from peftfx.kernels.rates import rates

TARGET = ""
DEVICES = ("cuda", "cpu")


def cases(setting: Setting) -> Mapping[str, Measure]:
    def measure() -> list[Row]:
        found = rates(setting.device, 1 if setting.tiny else setting.rounds,
                      64 if setting.tiny else None)  # fmt: skip
        units = "TFLOP/s of 16-bit, tf32 and fp32 products, GB/s of a copy, µs for a tiny launch"
        return [Row("rates", found, unit=units, over=None)]

    return {"rates": measure}
