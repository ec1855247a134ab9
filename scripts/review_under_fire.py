"""Fifty raters give 5,000 verdicts while the server is killed ten times: is each acknowledged one saved?

Usage: review_under_fire.py RUN [--raters 50] [--verdicts 5000] [--kills 10]. RUN is copied; the server is the real one.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

from saeffect.review.store import STORE, VerdictStore


class Load:
    """Raters in threads; like the page's script, each repeats a request until it is answered."""

    def __init__(self, url: str, wanted: int) -> None:
        self.url, self.wanted = url, wanted
        self.acknowledged: dict[str, tuple[str, str]] = {}  # request: rater, verdict
        self.seconds: list[float] = []
        self.repeats = 0
        self._lock = threading.Lock()

    def rate(self, number: int) -> None:
        name = f"rater {number}"
        choose = random.Random(number)
        with httpx.Client(base_url=self.url, headers={"Origin": self.url}, timeout=30) as client:
            page = self._post(client, "/review/join", data={"name": name, "again": "yes"}, follow_redirects=True)
            html = page.text
            while 'name="item"' in html and len(self.acknowledged) < self.wanted:
                fields = {key: html.split(f'name="{key}" value="')[1].split('"')[0] for key in ("item", "request")}
                verdict = choose.choice(["yes", "no", "unsure"])
                started = time.monotonic()
                response = self._post(client, "/api/review/verdict", json=fields | {"verdict": verdict})
                with self._lock:
                    self.acknowledged[fields["request"]] = (name, verdict)
                    self.seconds.append(time.monotonic() - started)
                html = response.json()["html"]

    def _post(self, client: httpx.Client, path: str, **values: object) -> httpx.Response:
        while True:
            try:
                response = client.post(path, **values)  # type: ignore[arg-type]
            except httpx.HTTPError:
                with self._lock:
                    self.repeats += 1
                time.sleep(0.2)
                continue
            response.raise_for_status()
            return response


def start(run: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "saeffect", "serve", str(run), "--port", str(port), "--no-open"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return process
        time.sleep(0.1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--raters", type=int, default=50)
    parser.add_argument("--verdicts", type=int, default=5000)
    parser.add_argument("--kills", type=int, default=10)
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        shutil.copytree(options.run, run)
        server = start(run, port)
        load = Load(f"http://127.0.0.1:{port}", options.verdicts)
        threads = [threading.Thread(target=load.rate, args=(n,)) for n in range(options.raters)]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        kills = 0
        while any(thread.is_alive() for thread in threads):
            time.sleep(0.05)
            if kills < options.kills and len(load.acknowledged) >= (kills + 1) * options.verdicts / (options.kills + 1):
                server.send_signal(signal.SIGKILL)
                server.wait()
                kills += 1
                server = start(run, port)
        seconds = time.monotonic() - started
        server.send_signal(signal.SIGKILL)
        server.wait()
        with VerdictStore(run / STORE) as store:
            saved = [
                (str(request), (str(rater), str(verdict)))
                for request, rater, verdict in store._read(
                    "SELECT request, raters.name, verdict FROM history JOIN raters ON raters.id = history.rater"
                )
            ]
    by_request, lost = dict(saved), 0
    for request, verdict_given in load.acknowledged.items():
        lost += by_request.get(request) != verdict_given
    load.seconds.sort()
    median, p95 = load.seconds[len(load.seconds) // 2], load.seconds[int(0.95 * len(load.seconds))]
    print(f"{len(load.acknowledged)} acknowledged by {options.raters} raters in {seconds:.0f} s, {kills} kills")
    print(f"{load.repeats} requests sent again; median {1000 * median:.0f} ms, 95th percentile {1000 * p95:.0f} ms")
    unacknowledged = len(saved) - len(load.acknowledged)
    print(f"{lost} lost; {len(saved) - len(by_request)} doubled; {unacknowledged} saved unacknowledged")
    return 1 if lost or len(saved) != len(by_request) else 0


if __name__ == "__main__":
    sys.exit(main())
