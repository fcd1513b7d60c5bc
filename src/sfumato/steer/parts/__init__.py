"""What patches are made of."""
