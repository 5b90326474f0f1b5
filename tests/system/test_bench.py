"""The benchmarks run: every figure comes out, with its floor. What they say is not judged here."""

from __future__ import annotations

import json
import subprocess
import sys


def test_every_benchmark_gives_its_figure_and_floor() -> None:
    done = subprocess.run([sys.executable, "-m", "bench", "--short"], capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    figures = [json.loads(line) for line in done.stdout.splitlines()]
    assert [figure["figure"] for figure in figures] == [
        "unary publish",
        "batched publish",
        "unary publish at 1 times the peak, clients as the SDK",
        "unary publish at 1 times the peak, raw clients",
        "publish to opened, live stream",
        "publish to opened, push",
        "whole path, push",
        "whole path, live stream",
        "seal for 1 device of suite 1, prekeys verified",
        "seal for 3 devices of suite 1, prekeys verified",
        "seal for 8 devices of suite 1, prekeys verified",
        "seal for 1 device of suite 2, prekeys verified",
        "seal for 3 devices of suite 2, prekeys verified",
        "seal for 8 devices of suite 2, prekeys verified",
        "seal for 8 devices of both suites, prekeys verified",
        "open, suite 1",
        "open, suite 2",
        "Seal by the service, suite 1, one device each",
        "Seal by the service, suite 2, one device each",
        "APNs provider, simulated push service",
        "APNs provider, minimal push service",
        "FCM provider, simulated push service",
        "FCM provider, minimal push service",
        "HMS provider, simulated push service",
        "HMS provider, minimal push service",
        "APNs dispatch, queued to PUSHED",
        "FCM dispatch, queued to PUSHED",
        "HMS dispatch, queued to PUSHED",
        "two lanes beside a black hole",
        "storm: FCM 429 QUOTA_EXCEEDED, Retry-After",
        "storm: HMS 503",
        "half-sent bodies without a token",
        "half-sent to a call that needs none, long",
        "half-sent to a call that needs none, short",
        "10 idle connections",
        "20 streams at once",
    ]
    for figure in figures:
        assert figure["value"] > 0
        assert figure["floor_value"] > 0
        assert figure["ratio"] > 0
    # Whoever comes in a crowd is let in.
    assert [figure["opened"] for figure in figures if "opened" in figure] == [20]
    # What a storm delays is not lost.
    assert all(figure["pushed"] == figure["wake_ups"] for figure in figures if "pushed" in figure)
