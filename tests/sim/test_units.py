"""Formatters: three digits, the unit that suits."""

import pytest

from sim.units import GB, GIB, KIB, MIB, format_bytes, format_rate, format_seconds


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (KIB, "1 KiB"),
        (1.5 * KIB, "1.5 KiB"),
        (999 * KIB, "999 KiB"),
        (1000 * KIB, "1,000 KiB"),
        (14.2 * GIB, "14.2 GiB"),
        (640 * MIB, "640 MiB"),
        (123_456 * GIB, "123,456 GiB"),
        (-2 * GIB, "-2 GiB"),
    ],
)
def test_bytes(size_bytes: float, text: str) -> None:
    assert format_bytes(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (12.34, "12.3 s"),
        (1.0, "1 s"),
        (0.0456, "45.6 ms"),
        (7.8e-6, "7.8 us"),
        (123e-6, "123 us"),
        (4.2e-8, "0.042 us"),
        (1234.5, "1,234 s"),
        (-0.5, "-500 ms"),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(54.6 * GB, "54.6 GB/s"), (0.5 * GB, "0.5 GB/s"), (1555 * GB, "1,555 GB/s"), (0, "0 GB/s")]
)
def test_rates(rate: float, text: str) -> None:
    assert format_rate(rate) == text
