"""What distillation is made of: its data, its segments of time."""
