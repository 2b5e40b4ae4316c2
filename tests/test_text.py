"""Numbers to words and back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perfmodel import text
from perfmodel.errors import InputError


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (0, "0 ns"),
        (7, "7.00 ns"),
        (2771.6, "2.77 µs"),
        (45_600, "45.6 µs"),
        (999_499, "999 µs"),
        (999_700, "1.00 ms"),
        (1.5e9, "1.50 s"),
        (7.2e12, "7,200 s"),
        (-2000, "-2.00 µs"),
        (None, "n/a"),
    ],
)
def test_durations(value: float | None, words: str) -> None:
    assert text.ns(value) == words


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (text.n_bytes(352_321_536), "352 MB"),
        (text.n_bytes(96e9), "96.0 GB"),
        (text.n_bytes(None), "n/a"),
        (text.bytes_per_s(4e12), "4.00 TB/s"),
        (text.bytes_per_s(None), "n/a"),
        (text.flops_per_s(989e12), "989 TFLOP/s"),
        (text.flops_per_s(None), "n/a"),
        (text.frac(0.3125), "31.2 %"),
        (text.frac(None), "n/a"),
        (text.count(12345), "12,345"),
        (text.count(None), "n/a"),
        (text.in_unit(1e6, "ns"), "1.00 ms"),
        (text.in_unit(132, "count"), "132"),
    ],
)
def test_other_quantities(written: str, words: str) -> None:
    assert written == words


@pytest.mark.parametrize(
    ("words", "n_bytes"),
    [
        ("40GiB", 42_949_672_960),
        ("512 MB", 512_000_000),
        ("0.5 kB", 500),
        (".5kB", 500),
        ("1e3B", 1000),
        (" 1 TiB ", 2**40),
    ],
)
def test_sizes_are_read(words: str, n_bytes: int) -> None:
    assert text.parse_bytes(words) == n_bytes


@pytest.mark.parametrize("words", ["", "40", "GB", "40 GB/s", "40 gb", "-1 GB", "4,5 GB", "nan GB", "1e999 GB", "3 ns"])
def test_words_that_are_no_size_are_refused(words: str) -> None:
    with pytest.raises(InputError, match="is not a size in bytes; expected a number and a unit, such as 40GiB"):
        text.parse_bytes(words)


@given(st.integers(min_value=0, max_value=10**17))
def test_sizes_survive_being_written(n_bytes: int) -> None:
    assert text.parse_bytes(text.n_bytes(n_bytes)) == pytest.approx(n_bytes, rel=0.006)


@pytest.mark.parametrize(
    ("value", "unit", "base"),
    [(3, "us", (3000, "ns")), (2, "GiB", (2**31, "bytes")), (64, "GB/s", (64e9, "bytes_per_s"))],
)
def test_base_units(value: float, unit: str, base: tuple[float, str]) -> None:
    assert text.to_base(value, unit) == base


def test_every_unit_belongs_to_a_writer() -> None:
    for unit, (suffix, factor) in text.UNITS.items():
        assert text.in_unit(factor, suffix), unit


def test_unknown_unit_lists_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown unit 'Gb'; known units: ns, us"):
        text.to_base(1, "Gb")


def test_short_names_are_left_alone_and_control_characters_are_not_printed() -> None:
    assert text.shortened("gemm", 4) == "gemm"
    assert text.shortened("abcdefghij", 7) == "abcd…ij"
    assert text.shortened("a\x1b[31mb\n", 20) == "a?[31mb?"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("tklqt_ns", 1500, "1.50 µs"),
        ("bytes", 2000, "2.00 kB"),
        ("bytes_per_s", 3e9, "3.00 GB/s"),
        ("flops_per_s", 4e12, "4.00 TFLOP/s"),
        ("time_frac", 0.5, "50.0 %"),
        ("n_kernels", 1234, "1,234"),
        ("flops_per_byte", 1.25, "1.2"),
        ("tklqt_ns", None, "n/a"),
    ],
)
def test_figures_are_written_by_the_unit_in_their_name(name: str, value: float | None, words: str) -> None:
    assert text.figure(name, value) == words


@pytest.mark.parametrize(("words", "value"), [("180us", 180_000), ("0.18 ms", 180_000), ("7ns", 7), ("2e-3s", 2e6)])
def test_times_are_read_in_any_unit(words: str, value: float) -> None:
    assert text.parse_ns(words) == pytest.approx(value)


@pytest.mark.parametrize("words", ["", "180", "12GB", "-3us", "fast"])
def test_what_is_no_time_is_refused(words: str) -> None:
    with pytest.raises(InputError, match="such as 180us"):
        text.parse_ns(words)
