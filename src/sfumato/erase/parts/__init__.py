"""What erasers are made of: closed forms, searches, the run of those that train."""
