"""Tables, and their place on the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.report import PAGE, stamp, table, write_section

PAGE_TEXT = "before\n<!-- begin a -->\nold\n<!-- end a -->\nbetween\n<!-- begin b -->\n<!-- end b -->\nafter\n"
SECTIONS = ("engine-float32", "engine-bfloat16", "engine-integer", "gpu-kernels", "gpu-engine")


@pytest.fixture
def page(tmp_path: Path) -> Path:
    path = tmp_path / "page.md"
    path.write_text(PAGE_TEXT, encoding="utf-8")
    return path


def test_a_table() -> None:
    assert table(("a", "b"), [["1", "2"], ["3", ""]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 |  |"


def test_a_section_is_replaced_and_nothing_else(page: Path) -> None:
    # What looks like a reference to a group is text.
    write_section("a", "new \\1\nµs", page)
    assert page.read_text(encoding="utf-8") == PAGE_TEXT.replace("old", "new \\1\nµs")
    write_section("a", "newer", page)
    assert page.read_text(encoding="utf-8") == PAGE_TEXT.replace("old", "newer")


@pytest.mark.parametrize(("name", "count"), [("c", 0), ("a", 2)])
def test_markers_must_stand_there_once(page: Path, name: str, count: int) -> None:
    text = PAGE_TEXT + "<!-- begin a --><!-- end a -->\n"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=rf"begin {name} .* stand there {count} times"):
        write_section(name, "new", page)
    assert page.read_text(encoding="utf-8") == text


@pytest.mark.parametrize("name", SECTIONS)
def test_the_page_has_the_sections_that_make_writes(name: str, tmp_path: Path) -> None:
    assert name in (PAGE.parents[1] / "Makefile").read_text(encoding="utf-8") or name == "gpu-kernels"
    copy = tmp_path / "page.md"
    copy.write_text(PAGE.read_text(encoding="utf-8"), encoding="utf-8")
    write_section(name, "measured", copy)
    assert f"<!-- begin {name} -->\nmeasured\n<!-- end {name} -->" in copy.read_text(encoding="utf-8")


def test_a_stamp_names_no_folder() -> None:
    argv = ["/opt/x/bench/engine.py", "--vllm-python", "/opt/v/bin/python", "--vllm-preload", "/a/libx.so:/b/liby.so"]
    argv += ["--model", "owner/name", "--gguf", "../models/m.gguf", "--only", "a b"]
    shown = stamp("a device", argv)
    command, date, device = shown.rpartition("`")[0] + "`", *shown.rpartition("`")[2].strip(", .").split(", ")
    assert command == (
        "`python -m bench.engine --vllm-python python --vllm-preload libx.so:liby.so --model owner/name "
        "--gguf m.gguf --only 'a b'`"
    )
    assert len(date) == len("2026-01-31")
    assert device == "a device"
