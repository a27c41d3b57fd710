"""What a step costs: time, host time and memory, beside torch's own. See docs/benchmarks.md."""
