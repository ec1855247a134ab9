"""What a site reads, and that it reads again when a file changes."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pandas as pd
import pytest

from saeffect.errors import BadFile, NotFound
from saeffect.web.site import Site


def test_a_table_is_read_again_when_its_file_changes(tmp_path: Path) -> None:
    site, file = Site(tmp_path), tmp_path / "a.parquet"
    with pytest.raises(NotFound):
        site.table("a.parquet")
    pd.DataFrame({"x": [1]}).to_parquet(file)
    first = site.table("a.parquet")
    assert site.table("a.parquet") is first
    pd.DataFrame({"x": [1, 2]}).to_parquet(file)
    assert len(site.table("a.parquet")) == 2
    file.write_bytes(b"PAR1")
    with pytest.raises(BadFile):
        site.table("a.parquet")


def test_threads_that_ask_together_wait_for_one(tmp_path: Path) -> None:
    site, made = Site(tmp_path), []

    def make() -> int:
        made.append(1)
        time.sleep(0.02)
        return len(made)

    threads = [threading.Thread(target=lambda: site.cached("x", (), make)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [1]


@pytest.mark.parametrize("parts", [("..", "x"), ("a/../../x",), ("/etc/passwd",), ("link", "x"), ("a\0b",), ("loop",)])
def test_no_path_leads_out(tmp_path: Path, parts: tuple[str, ...]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "link").symlink_to(tmp_path)
    (run / "loop").symlink_to(run / "loop")
    with pytest.raises(NotFound):
        Site(run).path(*parts)


def test_run_path_may_be_relative_or_a_link(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert Site(tmp_path / "run" / ".." / "run").has("a")
    assert Site(tmp_path / "link").has("a")


def test_the_latest_action_ends_first(tmp_path: Path) -> None:
    site, ended = Site(tmp_path), []
    site.on_close(lambda: ended.append(1))
    site.on_close(lambda: ended.append(2))
    site.close()
    site.close()
    assert ended == [2, 1]
