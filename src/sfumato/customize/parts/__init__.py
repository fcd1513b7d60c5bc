"""What customisers are made of."""
