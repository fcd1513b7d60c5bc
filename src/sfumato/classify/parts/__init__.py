"""What classifiers are made of."""
