"""What single recipes are made of."""
