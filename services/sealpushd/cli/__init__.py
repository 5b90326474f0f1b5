"""The command line: `sealpush …`. Each command imports what it needs when it runs, so that help and `serve` start fast."""
