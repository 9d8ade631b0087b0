"""What a continual run came to: `figures` from its lines, `report` of its folder."""
