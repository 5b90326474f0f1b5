"""The services of the suite, what they stand on, and the commands that run them."""

import os

# gRPC's core writes to standard error past every logger: a line for each stranger that speaks no TLS to a TLS port, as fast as strangers
# can connect. It reads this once, when it is first imported, and so before any of these packages imports it.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
