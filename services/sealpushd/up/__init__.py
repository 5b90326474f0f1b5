"""The whole of Sealpush on one machine: engines, six services and simulators as processes, and a show of what they do."""
