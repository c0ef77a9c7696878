import platform
from types import SimpleNamespace

import pytest

from switchkd.training import memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_glibc_takes_the_settings():
    assert memory.keep_freed_memory() is True


def test_a_setting_that_is_refused_is_told(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    taken = []

    def mallopt(option, value):
        taken.append(option)
        return int(option != memory.TRIM_THRESHOLD)

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    assert memory.keep_freed_memory() is False
    assert memory.TRIM_THRESHOLD in taken


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda _: pytest.fail("the C library was touched"))
    assert memory.keep_freed_memory() is False
