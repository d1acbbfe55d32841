"""Models and task heads."""
