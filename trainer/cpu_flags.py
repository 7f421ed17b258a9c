"""What the processor of this machine can do, as Linux tells it.

Of bfloat16 only: where a CPU has no instructions for it, torch and vLLM compute with it all the same, several times
slower than with float32 (a product of 2048 x 2048, one thread: 31 GFLOP/s, in float32 157). Other systems tell nothing.
Called by `tracegrad train`.
"""

from pathlib import Path

_BFLOAT16 = {"avx512_bf16", "amx_bf16", "bf16", "svebf16"}
CPUINFO = Path("/proc/cpuinfo")


def lacks_bfloat16(cpuinfo: str) -> bool:
    """Return whether these processors are known to have no instructions for bfloat16."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    flags = {word for name, _, words in lines if name.strip() in ("flags", "Features") for word in words.split()}
    return bool(flags) and not flags & _BFLOAT16


def slow_bfloat16() -> bool:
    """As `lacks_bfloat16`, of this machine."""
    return CPUINFO.exists() and lacks_bfloat16(CPUINFO.read_text())
