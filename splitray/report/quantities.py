"""Quantities as a person reads them: three digits and a unit."""

_BYTES = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def bytes_text(num_bytes: float) -> str:
    """`10.2 MB`; SI prefixes, as everywhere in splitray."""
    for unit, name in _BYTES:
        if num_bytes >= 0.9995 * unit:
            return f"{_digits(num_bytes / unit)} {name}"
    return f"{num_bytes:.0f} B"


def seconds_text(seconds: float) -> str:
    """Seconds as text, in the unit that fits: `12.3 ms` or `1.23 s`."""
    if seconds >= 0.9995:
        return f"{_digits(seconds)} s"
    return f"{_digits(seconds * 1e3)} ms" if seconds >= 0.9995e-3 else f"{_digits(seconds * 1e6)} us"


def joule_text(joule: float) -> str:
    """Joule as text, in the unit that fits: `12.3 J` or `1.23 kJ`."""
    return f"{_digits(joule / 1e3)} kJ" if joule >= 999.5 else f"{_digits(joule)} J"


def share_text(part: float, whole: float) -> str:
    """`25 %`; something is never shown as nothing."""
    percent = 100 * part / whole if whole else 0.0
    return "<1 %" if 0 < percent < 0.5 else f"{percent:.0f} %"


def _digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
