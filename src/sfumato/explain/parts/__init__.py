"""What judges of explanations are made of."""
