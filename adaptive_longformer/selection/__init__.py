"""Which blocks of keys every block of queries reads."""
