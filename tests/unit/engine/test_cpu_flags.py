"""Whether bfloat16 is fast here is told by the processor's flags."""

import pytest

from tracegrad.trainer.cpu_flags import lacks_bfloat16


@pytest.mark.parametrize(
    ("cpuinfo", "lacks"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx512f avx512_vnni\n", True),
        ("flags\t\t: fpu avx512f avx512_bf16\n", False),
        ("flags\t\t: avx512f amx_bf16 amx_tile\n", False),
        ("Features\t: fp asimd svebf16 bf16\n", False),
        ("Features\t: fp asimd\n", True),
        ("model name\t: bf16\n", False),
        ("", False),
    ],
)
def test_a_processor_that_tells_nothing_is_not_complained_of(cpuinfo: str, lacks: bool) -> None:
    assert lacks_bfloat16(cpuinfo) is lacks
