"""What protections are made of, and how they are judged."""
