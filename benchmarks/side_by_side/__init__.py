"""What the speed benchmarks share: the contestants, the measuring, and the report."""
