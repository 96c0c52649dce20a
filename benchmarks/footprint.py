"""What a server costs before it does anything: time to ready, memory of both processes, processor time while idle.

    python benchmarks/footprint.py [--idle 20] [-- options of quire serve]

Linux only: figures are the kernel's own, from /proc. Memory is the resident set after one completion.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path


def resident_mib(pid: int) -> float:
    """Resident set size."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) / 1024


def cpu_seconds(pid: int) -> float:
    """User and system time so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def complete(url: str) -> None:
    """One short completion."""
    model = json.load(urllib.request.urlopen(f"{url}/v1/models"))["data"][0]["id"]
    body = json.dumps({"model": model, "prompt": "import ", "max_tokens": 8}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request).read()


def main() -> None:
    """Start a server, look at it, stop it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle", type=float, default=20.0, help="seconds to watch the idle server")
    parser.add_argument("serve", nargs="*", help="options of quire serve")
    args = parser.parse_args()
    started = time.perf_counter()
    server = subprocess.Popen(
        [sys.executable, "-m", "quire.server", "serve", "--port", "0", *args.serve], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout
    line = server.stdout.readline()
    ready = time.perf_counter() - started
    url = re.findall(r"http://\S+", line)[0]
    engine = int(Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text())
    complete(url)
    time.sleep(2)
    before = cpu_seconds(server.pid), cpu_seconds(engine)
    time.sleep(args.idle)
    after = cpu_seconds(server.pid), cpu_seconds(engine)
    idle = [(b - a) / args.idle * 100 for a, b in zip(before, after, strict=True)]
    print(line.strip())
    print(f"ready after          {ready:6.1f} s")
    print(f"server process       {resident_mib(server.pid):6.0f} MiB resident, {idle[0]:.1f} % of a core idle")
    print(f"engine process       {resident_mib(engine):6.0f} MiB resident, {idle[1]:.1f} % of a core idle")
    server.send_signal(signal.SIGTERM)
    server.wait()


if __name__ == "__main__":
    main()
