"""Coverage-guided fuzzing of what parses strangers' bytes. `make fuzz` runs it for long, the tests for a moment."""
