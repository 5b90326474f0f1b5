"""What every service stands on: settings, logs, metrics, errors, access, servers, clients, database, vault."""

import os

# gRPC's core writes a line of its own, past every limit of the log, for each connection that does not speak TLS: whoever can reach a public
# listener could fill the disk. It reads this when it is imported, so nothing of this package is imported before.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
