"""`python -m tests.chaos [--seconds N] [--rate N] [--processes N] [--signal TERM|KILL]`: campaigns against the real suite.

Without --processes and --signal all four: one and two processes of each service, ended by SIGTERM (a rolling restart) and by SIGKILL (a
machine that dies). Each publishes and receives at a steady rate while single processes end, one after the other, and come back. What
happens meanwhile is told on standard error, and in the end all campaigns as a table; the one line of standard output is a JSON object.
Exit code 1 where a message was lost or shown twice, where something refused arrived, or where a rolling restart of two processes of each
service failed a call.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys

from tests.chaos.campaign import Report, run, table

SIGNALS = {"TERM": signal.SIGTERM, "KILL": signal.SIGKILL}


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60, help="how long processes are ended, in each campaign")
    parser.add_argument("--rate", type=float, default=20, help="messages a second")
    parser.add_argument("--processes", type=int, choices=(1, 2, 3, 4), help="of each service; default: a campaign with 1, one with 2")
    parser.add_argument("--signal", choices=sorted(SIGNALS), help="default: a campaign with each")
    given = parser.parse_args()
    numbers = [SIGNALS[given.signal]] if given.signal else list(SIGNALS.values())
    counts = [given.processes] if given.processes else [2, 1]
    reports: list[Report] = []
    for number in numbers:
        for processes in counts:
            print(f"{number.name}, {processes} process(es) of each service, {given.seconds:g} s ...", file=sys.stderr, flush=True)
            reports.append(asyncio.run(run(processes, number, given.seconds, given.rate)))
    print(table(reports), file=sys.stderr)
    print(json.dumps({"ok": all(report.ok for report in reports), "campaigns": [report.summary() for report in reports]}))
    return 0 if all(report.ok for report in reports) else 1


if __name__ == "__main__":
    raise SystemExit(main())
