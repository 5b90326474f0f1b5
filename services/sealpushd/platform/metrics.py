"""Prometheus metrics that every service has, and the listener that serves them."""

from __future__ import annotations

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, disable_created_metrics, start_http_server

from sealpush.v1 import common_pb2

# The time a series was made at doubles what is scraped, and tells nothing that the start of the process does not.
disable_created_metrics()  # type: ignore[no-untyped-call]  # the one function of the package without types

RPC_SECONDS = Histogram(
    "sealpush_rpc_seconds",
    "Time a call took in this service, by method.",
    ["method"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
)
RPC_ANSWERS = Counter("sealpush_rpc_answers", "Calls answered, by method and gRPC code.", ["method", "code"])
RPC_IN_FLIGHT = Gauge("sealpush_rpc_in_flight", "Calls being served.", ["method"])
ADMISSION_ADMITTED = Counter("sealpush_admission_admitted", "Calls, and pieces of streams, that were let in.")
ADMISSION_REFUSED = Counter(
    "sealpush_admission_refused",
    "Calls refused at the door as OVERLOADED: full (more than is finished in time), share (the caller's), deadline (too short for now).",
    ["reason", "caller"],
)
ADMISSION_LIMIT = Gauge("sealpush_admission_limit", "Units of work that may be in flight at present; one for each 4 KiB of a request.")
ADMISSION_IN_FLIGHT = Gauge("sealpush_admission_in_flight", "Units of work in flight.")
MESH_BATCH_ITEMS = Histogram(
    "sealpush_mesh_batch_items",
    "Items that one call to another service carried.",
    ["method"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
)
DB_SECONDS = Histogram(
    "sealpush_db_seconds",
    "Time a statement took, by its name.",
    ["statement"],
    buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5),
)
DB_RECONNECTS = Counter("sealpush_db_reconnects", "Connections to PostgreSQL that had to be made again.")
AWAY = Gauge("sealpush_away", "Things that this process needs, or works at, and that do not answer at present, by what they are.", ["what"])
DELIVERIES = Counter("sealpush_deliveries", "Deliveries that entered a state.", ["state"])
WAKE_UPS = Counter("sealpush_wake_ups", "Wake-ups by lane and outcome.", ["app", "platform", "outcome"])
VALKEY_ERRORS = Counter("sealpush_valkey_errors", "Calls to Valkey that failed and were gone on without.", ["use"])
# From the beginning, so that an alert on it does not miss the first.
for _use in ("publish", "presence", "limit", "listen"):
    VALKEY_ERRORS.labels(_use)
LIMITS_EXCEEDED = Counter("sealpush_limits_exceeded", "Calls refused because a rate limit was used up, by limit.", ["limit"])
STREAMS_OPEN = Gauge("sealpush_streams_open", "Device streams that are open.")


def platform_label(platform: int) -> str:
    """A platform as metrics name it, "ios"; its number when it is newer than this program."""
    try:
        return common_pb2.Platform.Name(common_pb2.Platform.ValueType(platform)).removeprefix("PLATFORM_").lower()
    except ValueError:
        return str(platform)


def serve_metrics(host: str, port: int) -> int:
    """Serve `/metrics` on a thread of its own; returns the port. Raises OSError when the port is taken."""
    server, _ = start_http_server(port, addr=host, registry=REGISTRY)
    bound: int = server.server_port
    return bound
