"""What attributions are made of: the game of alliances, workflows of parts, and what pictures are compared by."""
