"""Numbers as people read them."""


def gigabytes(num_bytes: float) -> str:
    """Bytes as people write them: 12.3 GB."""
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:,.1f} MB"


def speed(bytes_per_second: float) -> str:
    """Bandwidth as people write it: 1.21 GB/s."""
    return f"{bytes_per_second / 1e9:.2f} GB/s" if bytes_per_second >= 1e8 else f"{bytes_per_second / 1e6:.2f} MB/s"


def milliseconds(seconds: float) -> str:
    """Seconds as people read short ones: 12.3 ms."""
    return f"{seconds * 1e3:,.{2 if abs(seconds) < 1e-3 else 1}f} ms"
