"""What the benchmark of attention patterns is made of: tasks, variants, training and summary."""
