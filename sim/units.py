"""Unit constants and formatters: the one place, with the CLI and figures, where units are converted."""

KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12
KIB, MIB, GIB = 2**10, 2**20, 2**30
MICRO, MILLI = 1e-6, 1e-3
TERA = 10**12


def format_bytes(size_bytes: float) -> str:
    """Binary multiples, three significant digits: ``14.2 GiB``."""
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size_bytes) >= scale:
            return (
                f"{size_bytes / scale:.3g} {unit}" if size_bytes < 1000 * scale else f"{size_bytes / scale:,.0f} {unit}"
            )
    return f"{size_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    """``12.3 s``, ``45.6 ms`` or ``7.8 us``, three significant digits."""
    for unit, scale in (("s", 1.0), ("ms", MILLI), ("us", MICRO)):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.3g} {unit}" if seconds < 1000 * scale else f"{seconds / scale:,.0f} {unit}"
    return "0 s" if seconds == 0 else f"{seconds / MICRO:.2g} us"


def format_rate(bytes_per_s: float) -> str:
    """Decimal gigabytes a second, as link and memory makers state them: ``54.6 GB/s``."""
    return f"{bytes_per_s / GB:,.3g} GB/s" if bytes_per_s < 1000 * GB else f"{bytes_per_s / GB:,.0f} GB/s"


def format_per_s(count_per_s: float) -> str:
    """Tokens or anything else that is counted, a second, three significant digits below 100: ``2,445``, ``0.62``."""
    return f"{count_per_s:,.0f}" if abs(count_per_s) >= 100 else f"{count_per_s:.3g}"
